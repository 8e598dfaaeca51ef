// out[e] = Σ over the pairs (g, i) that chose e, in their order, of Σ_l small[gL + l, i] · big[gL + l].
//
// Items are the pairs sorted by expert, each with its L rows, P·L of them. They are cut into chunks of the same number
// of items, and a warp walks a chunk for one tile of columns with its sum in registers: a hot expert is as much work in
// parallel as many cold ones. A run of one expert that lies within a chunk is that expert's row, and is written; what a
// chunk holds of a run that began before it or goes on behind it goes into `partials` [chunks, 2, n] fp32: [c, 0] what
// came in, [c, 1] what began there and goes on. A second kernel adds up the parts of each run in a fixed order. Nothing
// is atomic, and chunks depend on P·L alone: the same bits every time.
//
// Chunks are the inner order of the tasks: what works at the same time reads the same few columns of big, M·32·16 bytes
// a tile, which stay in L2 for the k visits to each row, so that memory sees big about once.
//
// Chunks hold 32, 64, 128 or 256 items: as few as make no more than 512 chunks, and 256 where there are more items.
// Partials take 8·n bytes a chunk: at most 4 MiB for 1024 columns, or a 128th of [M, k, n] in fp32 where that is more.
#pragma once

#include "rank1_experts_pieces.cuh"

namespace clora_kernels {
namespace {

constexpr int kFewestItems = 32, kMostItems = 256, kEnoughChunks = 512;

struct ReducePlan {
  int64_t pairs, length, total, n;
  int items;  // of a chunk
  int64_t chunks;

  ReducePlan(int64_t pairs, int64_t length, int64_t n)
      : pairs(pairs), length(length), total(pairs * length), n(n), items(kFewestItems) {
    while (items < kMostItems && total > static_cast<int64_t>(items) * kEnoughChunks) items *= 2;
    chunks = (total + items - 1) / items;
  }
};

struct Item {
  int64_t row;
  int expert;
  float weight;
};

// The pairs in the order of their experts. An order that names no pair is read as the nearest one that is.
struct Sorted {
  ChoicesOnDevice choices;
  const int* order;
  const float* small;  // [M, k]
  int64_t pairs, length;

  __device__ int pair(int64_t t) const { return max(0, min(order[t], static_cast<int>(pairs - 1))); }
  __device__ int expert_of(int64_t item) const { return choices[pair(length == 1 ? item : item / length)]; }

  __device__ Item operator[](int64_t item) const {
    const int64_t t = length == 1 ? item : item / length;
    const int p = pair(t), group = p / choices.k;
    const int64_t row = group * length + (item - t * length);
    return {row, choices[p], small[row * choices.k + (p - group * choices.k)]};
  }
};

template <typename X, typename Y, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    reduce_kernel(Rows<Y> out, float* partials, Rows<const X> big, Sorted sorted, ReducePlan plan) {
  constexpr int W = kWidth<X>, U = kVector ? 8 : 2;
  const int lane = threadIdx.x % kLanes;
  const int64_t tasks = plan.chunks * tiles_of(plan.n, W), step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes; task < tasks; task += step) {
    const int64_t columns = task / plan.chunks, chunk = task - columns * plan.chunks, begin = chunk * plan.items;
    const int64_t end = begin + plan.items < plan.total ? begin + plan.items : plan.total;
    const Span<W, kVector> span(columns, lane, plan.n);

    Item next = sorted[begin + lane < end ? begin + lane : end - 1];
    int expert = __shfl_sync(kAllLanes, next.expert, 0);
    bool came_in = begin > 0 && sorted.expert_of(begin - 1) == expert;
    float acc[W] = {};
    const auto finish = [&](bool goes_on) {
      if (came_in || goes_on) {
        Piece<float, W, kVector> piece;
#pragma unroll
        for (int j = 0; j < W; ++j) piece.set(j, acc[j]);
        piece.store(partials + (chunk * 2 + !came_in) * plan.n, span);
      } else {
        Piece<Y, W, kVector> piece;
#pragma unroll
        for (int j = 0; j < W; ++j) piece.set(j, acc[j]);
        piece.store(out[expert], span);
      }
    };

    for (int64_t from = begin; from < end; from += kLanes) {
      const Item now = next;
      const int64_t ahead = from + kLanes + lane;
      next = sorted[ahead < end ? ahead : end - 1];  // its loads, one behind the other, go on beside those of big
      const int count = static_cast<int>(end - from < kLanes ? end - from : kLanes);
      for (int i = 0; i < count; i += U) {
        Piece<X, W, kVector> piece[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int64_t row = __shfl_sync(kAllLanes, now.row, i + u);
          if (i + u < count) piece[u].load(big[row], span);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int chosen = __shfl_sync(kAllLanes, now.expert, i + u);
          const float weight = __shfl_sync(kAllLanes, now.weight, i + u);
          if (i + u >= count) break;
          if (chosen != expert) {
            finish(false);
            expert = chosen;
            came_in = false;
#pragma unroll
            for (int j = 0; j < W; ++j) acc[j] = 0;
          }
#pragma unroll
          for (int j = 0; j < W; ++j) acc[j] = fmaf(weight, piece[u].at(j), acc[j]);
        }
      }
    }
    finish(end < plan.total && sorted.expert_of(end) == expert);
  }
}

// The sum of the parts of a run that begins in chunk `from` and ends in chunk `last`, each step-th of them.
template <bool kVector>
__device__ inline void add_parts(const float* partials, int64_t from, int64_t first, int64_t last, int64_t step,
                                 const Span<kWidth<float>, kVector>& span, float (&acc)[kWidth<float>]) {
#pragma unroll 8
  for (int64_t part = first; part <= last; part += step) {
    Piece<float, kWidth<float>, kVector> piece;
    piece.load(partials + (part * 2 + (part == from)) * span.n, span);
#pragma unroll
    for (int j = 0; j < kWidth<float>; ++j) acc[j] += piece.at(j);
  }
}

template <typename Y, bool kVector>
__device__ inline void store_sums(Y* row, const Span<kWidth<float>, kVector>& span,
                                  const float (&acc)[kWidth<float>]) {
  Piece<Y, kWidth<float>, kVector> piece;
#pragma unroll
  for (int j = 0; j < kWidth<float>; ++j) piece.set(j, acc[j]);
  piece.store(row, span);
}

// Adds up the parts of each run that is in several chunks. Every chunk behind whose end the run goes on has a block, and
// these deal the tiles of columns among them. Of a short run a warp adds up all parts for a tile of its own; of a long
// one the warps of a block take the parts in turn.
template <typename Y, bool kVector>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Rows<Y> out, const float* partials, Sorted sorted, const int* starts, ReducePlan plan) {
  constexpr int W = kWidth<float>;
  __shared__ float sums[kWarps][W][kLanes];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t tiles = tiles_of(plan.n, W);
  for (int64_t chunk = blockIdx.x; chunk < plan.chunks - 1; chunk += gridDim.x) {
    const int64_t end = (chunk + 1) * plan.items;
    const int expert = sorted.expert_of(end - 1);
    if (sorted.expert_of(end) != expert) continue;  // as below, for the whole block alike
    const int64_t run = starts[expert] * plan.length, stop = starts[expert + 1] * plan.length;
    if (run < 0 || run >= end || stop <= end) continue;  // never, unless starts are not those of the order
    const int64_t from = run / plan.items, last = min((stop - 1) / plan.items, plan.chunks - 1);
    const int64_t blocks = last - from, own = chunk - from;

    if (blocks < kWarps) {
      for (int64_t tile = own + blocks * warp; tile < tiles; tile += blocks * kWarps) {
        const Span<W, kVector> span(tile, lane, plan.n);
        float acc[W] = {};
        add_parts(partials, from, from, last, 1, span, acc);
        store_sums(out[expert], span, acc);
      }
      continue;
    }
    for (int64_t tile = own; tile < tiles; tile += blocks) {
      const Span<W, kVector> span(tile, lane, plan.n);
      float acc[W] = {};
      add_parts(partials, from, from + warp, last, kWarps, span, acc);
#pragma unroll
      for (int j = 0; j < W; ++j) sums[warp][j][lane] = acc[j];
      __syncthreads();
      if (warp == 0) {
#pragma unroll
        for (int j = 0; j < W; ++j)
          for (int w = 1; w < kWarps; ++w) acc[j] += sums[w][j][lane];
        store_sums(out[expert], span, acc);
      }
      __syncthreads();
    }
  }
}

// Rows of zeros for the experts that nobody chose, which no run writes. Zero is all zero bits in every dtype.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    zero_kernel(Rows<Word> out, int64_t words, const int* starts, int64_t experts) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes; e < experts; e += step) {
    if (starts[e] != starts[e + 1]) continue;
    for (int64_t i = threadIdx.x % kLanes; i < words; i += kLanes) out[e][i] = Word{};
  }
}

}  // namespace
}  // namespace clora_kernels
