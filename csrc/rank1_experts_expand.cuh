// y[m] = base[m] + Σ_i small[m, i] · experts[index(m, i)].
//
// A warp takes one tile of columns of a tile of rows that share their choices, keeps its sums in registers and goes
// through the slots in their order, several of their experts on the way at once. Where every row has choices of its
// own, M·k·n elements of experts are read. Columns are the outer order of the tasks: what works at the same time reads
// the same few columns of the pool, E·32·16 bytes a tile, which stay in L2 though the pool may not, and memory sees the
// pool about once. Where rows are too few to fill the GPU, the slots are shared among `share` warps, whose sums are
// added in their order.
#pragma once

#include "rank1_experts_pieces.cuh"

namespace clora_kernels {
namespace {

struct ExpandPlan {
  RowTiles tiles;
  int64_t n, tasks;
  int share;  // warps of a task

  ExpandPlan(RowTiles tiles, int k, int64_t n, int width, int multiprocessors)
      : tiles(tiles), n(n), tasks(tiles.count * tiles_of(n, width)), share(1) {
    while (share < kWarps && 4 * share <= k && tasks * share < enough_warps(multiprocessors)) share *= 2;
  }
};

template <typename T, typename Y, bool kVector, int R>
__global__ void __launch_bounds__(kThreads, 2)
    expand_kernel(Rows<Y> y, const float* small, Rows<const T> experts, ChoicesOnDevice choices, Rows<const Y> base,
                  ExpandPlan plan) {
  constexpr int W = kWidth<T>, U = R == 1 && kVector ? 8 : 4;
  extern __shared__ float sums[];  // [kWarps, R·W, kLanes]
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int teams = kWarps / plan.share, team = warp / plan.share, part = warp % plan.share;
  const int k = choices.k;
  const int begin = static_cast<int>(static_cast<int64_t>(k) * part / plan.share);
  const int end = static_cast<int>(static_cast<int64_t>(k) * (part + 1) / plan.share);

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < plan.tasks;
       first += static_cast<int64_t>(gridDim.x) * teams) {
    const bool busy = first + team < plan.tasks;
    const int64_t task = busy ? first + team : 0, columns = task / plan.tiles.count;
    const RowTile tile = plan.tiles.at<R>(task - columns * plan.tiles.count);
    const Span<W, kVector> span(columns, lane, plan.n);
    float acc[R][W] = {};
    for (int slots = begin; busy && slots < end; slots += kLanes) {
      const int mine = min(slots + lane, end - 1), count = min(kLanes, end - slots);
      const int chosen = choices[tile.group * k + mine];
      float weights[R];
#pragma unroll
      for (int r = 0; r < R; ++r)
        weights[r] = small[(tile.first + min(r, tile.rows - 1)) * k + mine];
      for (int i = 0; i < count; i += U) {
        Piece<T, W, kVector> expert[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const T* row = experts[__shfl_sync(kAllLanes, chosen, i + u)];
          if (i + u < count) expert[u].load(row, span);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (i + u >= count) break;
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const float weight = __shfl_sync(kAllLanes, weights[r], i + u);
#pragma unroll
            for (int j = 0; j < W; ++j) acc[r][j] = fmaf(weight, expert[u].at(j), acc[r][j]);
          }
        }
      }
    }

    if (plan.share > 1) {
      float* own = sums + warp * (R * W * kLanes) + lane;
#pragma unroll
      for (int i = 0; i < R * W; ++i) own[i * kLanes] = acc[i / W][i % W];
      __syncthreads();
      for (int p = 1; part == 0 && p < plan.share; ++p)
#pragma unroll
        for (int i = 0; i < R * W; ++i) acc[i / W][i % W] += own[(p * R * W + i) * kLanes];
      __syncthreads();
    }
    if (!busy || part != 0) continue;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (r >= tile.rows) break;
      Piece<Y, W, kVector> piece;
      if (base.data) {
        piece.load(base[tile.first + r], span);
#pragma unroll
        for (int j = 0; j < W; ++j) acc[r][j] += piece.at(j);
      }
#pragma unroll
      for (int j = 0; j < W; ++j) piece.set(j, acc[r][j]);
      piece.store(y[tile.first + r], span);
    }
  }
}

}  // namespace
}  // namespace clora_kernels
