// shrink on the emulated GPU, launched as rank1_experts.cu does.
#include "calls.h"
#include "rank1_experts_shrink.cuh"

using namespace clora_kernels;

// Returns the ways it went: 1 by vectors, 2 in chunks of columns, 4 by warps that share a row.
CLORA_CALL int shrink(const Matrix& big, const Matrix& experts, const Call& call, float* out) {
  int ways = 0;
  with_type(big, [&](auto x) {
    with_type(experts, [&](auto t) {
      with_rows(call.length, [&](auto rows) {
        using X = decltype(x);
        using T = decltype(t);
        constexpr int R = decltype(rows)::value, W = kWidth<T>;
        const auto from = rows_of<const X>(big);
        const auto pool = rows_of<const T>(experts);
        const int64_t n = big.columns;
        const bool vectors = n % W == 0 && is_aligned(from, big.rows, W) && is_aligned(pool, experts.rows, W);
        const ShrinkPlan plan(RowTiles(call.groups, call.length, R), kShrinkSlots<R>, call.choices(), n, W,
                              Device{call.multiprocessors, call.l2_bytes});
        const auto sums = scratch(plan.chunks > 1 ? plan.chunks * plan.results : 0);
        float* to = plan.chunks > 1 ? sums.get() : out;
        const auto kernel = vectors ? shrink_kernel<X, T, true, R> : shrink_kernel<X, T, false, R>;
        gpu::launch(blocks_for(plan.tasks(), kWarps / plan.share),
                    [&] { kernel(from, pool, call.choices(), plan, to); });
        if (plan.chunks > 1) {
          gpu::launch(blocks_for(plan.results, kThreads),
                      [&] { add_chunks_kernel(sums.get(), plan.chunks, plan.results, out); });
        }
        ways = vectors + 2 * (plan.chunks > 1) + 4 * (plan.share > 1);
      });
    });
  });
  return ways;
}
