// order and reduce_ on the emulated GPU, launched as rank1_experts.cu does but for the sort between its two kernels.
#include "calls.h"
#include "rank1_experts_order.cuh"
#include "rank1_experts_reduce.cuh"

using namespace clora_kernels;

CLORA_CALL int keys(const Call& call, uint32_t* to, int* positions) {
  const int pairs = static_cast<int>(call.groups) * call.k;
  gpu::launch(blocks_for(pairs, kThreads), [&] { keys_kernel(call.choices(), pairs, to, positions); });
  return key_bits(call.experts);
}

CLORA_CALL void starts(const Call& call, const uint32_t* sorted, int* to) {
  const int pairs = static_cast<int>(call.groups) * call.k;
  gpu::launch(blocks_for(int64_t{call.experts} + 1, kThreads),
              [&] { starts_kernel(sorted, pairs, call.experts, to); });
}

template <typename Word>
void zero(const Matrix& out, const int* starts) {
  const int64_t size = sizeof(Word), words = out.columns * out.bytes / size;
  const Rows<Word> rows{static_cast<Word*>(out.data), out.stride * out.bytes / size};
  gpu::launch(blocks_for(out.rows, kWarps), [&] { zero_kernel(rows, words, starts, out.rows); });
}

// Returns the ways it went: 1 by vectors, 2 in chunks of items, 4 in more than two for each warp of a block.
CLORA_CALL int reduce(const Matrix& out, const float* small, const Matrix& big, const Call& call, const int* order,
                      const int* starts) {
  int ways = 0;
  const Rows<const uint8_t> bytes{static_cast<const uint8_t*>(out.data), out.stride * out.bytes};
  const bool wide = out.columns * out.bytes % 16 == 0 && is_aligned(bytes, out.rows, 16);
  (wide ? zero<uint4> : zero<uint16_t>)(out, starts);

  const ReducePlan plan(call.groups * call.k, call.length, out.columns);
  if (plan.total == 0) return ways;
  const auto partials = scratch(plan.chunks * 2 * plan.n);
  const Sorted sorted{call.choices(), order, small, plan.pairs, call.length};
  with_type(big, [&](auto x) {
    with_type(out, [&](auto y) {
      using X = decltype(x);
      using Y = decltype(y);
      constexpr int W = kWidth<X>, V = kWidth<float>;
      const auto from = rows_of<const X>(big);
      const auto to = rows_of<Y>(out);
      const bool vectors = plan.n % W == 0 && is_aligned(from, big.rows, W) && is_aligned(to, out.rows, W);
      const auto kernel = vectors ? reduce_kernel<X, Y, true> : reduce_kernel<X, Y, false>;
      gpu::launch(blocks_for(plan.chunks * tiles_of(plan.n, W), kWarps),
                  [&] { kernel(to, partials.get(), from, sorted, plan); });
      ways = vectors + 2 * (plan.chunks > 1) + 4 * (plan.chunks > 2 * kWarps);
      if (plan.chunks == 1) return;
      const bool combined = plan.n % V == 0 && is_aligned(to, out.rows, V);
      const auto combine = combined ? combine_kernel<Y, true> : combine_kernel<Y, false>;
      gpu::launch(blocks_for(plan.chunks - 1, 1), [&] { combine(to, partials.get(), sorted, starts, plan); });
    });
  });
  return ways;
}
