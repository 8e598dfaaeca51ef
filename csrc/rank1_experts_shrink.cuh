// out[m, i] = Σ_j big[m, j] · experts[index(m, i), j].
//
// A team of `share` warps takes a tile of rows that share their choices and up to `slots` of their slots, and walks the
// columns: a piece of each row of big serves all these slots, a piece of each expert all these rows. Where every row
// has choices of its own, M·k·n elements of experts are read, and M·n·⌈k / slots⌉ of big.
//
// Where the pool exceeds the L2 cache and its rows are chosen several times each, the columns are cut into chunks,
// which are the outer order of the tasks: what works at the same time reads the same columns of the pool, which stay in
// L2, and memory sees the pool about once instead of once for each choice. Each chunk leaves its sums, [chunks, M, k]
// fp32 with at most 16 chunks, and these are added in their order.
#pragma once

#include "rank1_experts_pieces.cuh"

namespace clora_kernels {
namespace {

constexpr int64_t kMostChunks = 16;

template <int R>
constexpr int kShrinkSlots = R == 1 ? 8 : 4;

struct Device {
  int multiprocessors, l2_bytes;
};

struct ShrinkPlan {
  RowTiles tiles;
  int64_t n, results;  // M·k
  int64_t pieces, chunks, pieces_of_chunk;
  int slots, share;  // slots and warps of a task
  int64_t blocks_of_slots, tasks_of_chunk;

  ShrinkPlan(RowTiles tiles, int most_slots, const ChoicesOnDevice& choices, int64_t n, int width, Device device)
      : tiles(tiles), n(n), results(tiles.rows() * choices.k), pieces(tiles_of(n, width)), chunks(1), slots(most_slots),
        share(1) {
    const int64_t pool = choices.experts * pieces * kLanes * 16, cache = std::max(device.l2_bytes / 2, 1);
    if (tiles.groups * choices.k >= 4 * static_cast<int64_t>(choices.experts))
      chunks = std::max<int64_t>(1, std::min({pieces, kMostChunks, (pool + cache - 1) / cache}));
    pieces_of_chunk = (pieces + chunks - 1) / chunks;
    if (pieces) chunks = (pieces + pieces_of_chunk - 1) / pieces_of_chunk;

    const int64_t enough = enough_warps(device.multiprocessors);
    split_slots(choices.k);
    // A warp that has the whole of a long row waits for one piece after the other; warps that share it wait at once
    while (share < kWarps && 2 * share <= pieces_of_chunk && (pieces_of_chunk > 8 * share || tasks() * share < enough))
      share *= 2;
    while (slots > 1 && tasks() * share < enough) {
      slots /= 2;
      split_slots(choices.k);
    }
  }

  __host__ __device__ int64_t tasks() const { return chunks * tasks_of_chunk; }

 private:
  void split_slots(int k) {
    blocks_of_slots = (static_cast<int64_t>(k) + slots - 1) / slots;
    tasks_of_chunk = tiles.count * blocks_of_slots;
  }
};

template <typename X, typename T, bool kVector, int R>
__global__ void __launch_bounds__(kThreads, 2)
    shrink_kernel(Rows<const X> big, Rows<const T> experts, ChoicesOnDevice choices, ShrinkPlan plan, float* out) {
  constexpr int W = kWidth<T>, U = kShrinkSlots<R>, kSame = kLanes / (R * U);  // lanes that get the same sum
  __shared__ float sums[kWarps][kLanes];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int teams = kWarps / plan.share, team = warp / plan.share, part = warp % plan.share;
  const int k = choices.k;

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < plan.tasks();
       first += static_cast<int64_t>(gridDim.x) * teams) {
    const bool busy = first + team < plan.tasks();
    const int64_t chunk = busy ? (first + team) / plan.tasks_of_chunk : 0;
    const int64_t task = busy ? first + team - chunk * plan.tasks_of_chunk : 0;
    const int64_t row_tile = task / plan.blocks_of_slots;
    const RowTile tile = plan.tiles.at<R>(row_tile);
    const int begin = static_cast<int>(task - row_tile * plan.blocks_of_slots) * plan.slots;
    const int slots = busy ? min(plan.slots, k - begin) : 0;
    float acc[R * U] = {};
    if (busy) {
      int chosen[U];  // pointers would take twice the registers
#pragma unroll
      for (int u = 0; u < U; ++u)
        chosen[u] = choices[tile.group * k + begin + min(u, slots - 1)];
      Piece<T, W, kVector> expert[U];
#pragma unroll
      for (int u = 0; u < U; ++u) expert[u].clear();
      const int64_t end = min((chunk + 1) * plan.pieces_of_chunk, plan.pieces);
      for (int64_t piece = chunk * plan.pieces_of_chunk + part; piece < end; piece += plan.share) {
        const Span<W, kVector> span(piece, lane, plan.n);
        Piece<X, W, kVector> x[R];
#pragma unroll
        for (int u = 0; u < U; ++u)
          if (u < slots) expert[u].load(experts[chosen[u]], span);
#pragma unroll
        for (int r = 0; r < R; ++r) x[r].load(big[tile.first + min(r, tile.rows - 1)], span);
        if (!span.any()) break;
#pragma unroll
        for (int j = 0; j < W; ++j) {
          float of_x[R];
#pragma unroll
          for (int r = 0; r < R; ++r) of_x[r] = x[r].at(j);
#pragma unroll
          for (int u = 0; u < U; ++u) {
            const float of_expert = expert[u].at(j);
#pragma unroll
            for (int r = 0; r < R; ++r) acc[r * U + u] = fmaf(of_x[r], of_expert, acc[r * U + u]);
          }
        }
      }
    }

    float sum = sum_over_lanes(acc, lane);
    if (plan.share > 1) {
      sums[warp][lane] = sum;
      __syncthreads();
      for (int p = 1; part == 0 && p < plan.share; ++p) sum += sums[warp + p][lane];
      __syncthreads();
    }
    const int r = lane / kSame / U, u = lane / kSame % U;
    if (part == 0 && lane % kSame == 0 && r < tile.rows && u < slots)
      out[chunk * plan.results + (tile.first + r) * k + begin + u] = sum;
  }
}

// The sums of the chunks, in their order.
__global__ void __launch_bounds__(kThreads)
    add_chunks_kernel(const float* of_chunks, int64_t chunks, int64_t results, float* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < results; i += step) {
    float sum = of_chunks[i];
#pragma unroll 4
    for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += of_chunks[chunk * results + i];
    out[i] = sum;
  }
}

}  // namespace
}  // namespace clora_kernels
