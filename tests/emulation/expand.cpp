// expand_ on the emulated GPU, launched as rank1_experts.cu does.
#include "calls.h"

namespace clora_kernels {
namespace {

thread_local float sums[kWarps * 4 * kWidth<__half> * kLanes];  // the kernel's `extern __shared__`

}  // namespace
}  // namespace clora_kernels

#include "rank1_experts_expand.cuh"

using namespace clora_kernels;

// `base` is null where there is none. Returns the ways it went: 1 by vectors, 4 by warps that share the slots.
CLORA_CALL int expand(const Matrix& y, const float* small, const Matrix& experts, const Call& call,
                      const Matrix* base) {
  int ways = 0;
  with_type(experts, [&](auto t) {
    with_type(y, [&](auto out) {
      with_rows(call.length, [&](auto rows) {
        using T = decltype(t);
        using Y = decltype(out);
        constexpr int R = decltype(rows)::value, W = kWidth<T>;
        const auto to = rows_of<Y>(y);
        const auto pool = rows_of<const T>(experts);
        const auto from = base ? rows_of<const Y>(*base) : Rows<const Y>{nullptr, 0};
        const int64_t n = y.columns;
        const bool vectors = n % W == 0 && is_aligned(pool, experts.rows, W) && is_aligned(to, y.rows, W) &&
                             is_aligned(from, y.rows, W);
        const ExpandPlan plan(RowTiles(call.groups, call.length, R), call.k, n, W, call.multiprocessors);
        const size_t shared = plan.share == 1 ? 0 : kWarps * R * W * kLanes;
        const auto kernel = vectors ? expand_kernel<T, Y, true, R> : expand_kernel<T, Y, false, R>;
        gpu::launch(blocks_for(plan.tasks, kWarps / plan.share),
                    [&] { kernel(to, small, pool, call.choices(), from, plan); },
                    {sums, sizeof(sums) / sizeof(float), shared});
        ways = vectors + 4 * (plan.share > 1);
      });
    });
  });
  return ways;
}
