// What the CUDA kernels of rank-1 experts share: how a warp holds a part of a row, which rows a choice names, and how
// rows that share their choices are tiled.
//
// All of them are bound by memory: of each row that a choice names, an element is used for one multiplication and one
// addition (for a few where rows share their choices), far below what a GPU computes while it loads one. So a lane
// loads 16 bytes at once, of several rows of its columns before it uses the first, straight into registers: with 8 such
// loads of 256 lanes in each of the two blocks of a multiprocessor, 64 KiB are asked for at a time. No lane needs what
// another one loaded: a stage in shared memory would cost its stores, reads and waits, and spare no load.
// What cannot be read as vectors (rows that are not aligned, a number of columns that is no multiple) is read element
// by element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace clora_kernels {
namespace {

constexpr int kLanes = 32, kWarps = 8, kThreads = kLanes * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

// Columns a lane holds of a row of T where T is the type whose rows are the bulk of what is loaded.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

// A matrix whose rows lie `stride` elements apart, their elements side by side.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;

  __device__ T* operator[](int64_t row) const { return data + row * stride; }
};

// The columns one lane holds of a tile, kLanes·W columns of [0, n): W consecutive ones where rows are read as vectors,
// which takes n to be a multiple of W; else W ones kLanes apart, so that lanes still read side by side.
template <int W, bool kVector>
struct Span {
  int64_t first, n;

  __device__ Span(int64_t tile, int lane, int64_t n)
      : first(tile * (kLanes * W) + (kVector ? lane * W : lane)), n(n) {}

  __device__ bool any() const { return first < n; }
  __device__ int64_t column(int j) const { return kVector ? first + j : first + j * kLanes; }
  __device__ bool has(int j) const { return kVector ? first < n : column(j) < n; }
};

__host__ __device__ inline int64_t tiles_of(int64_t n, int width) {
  return (n + kLanes * width - 1) / (kLanes * width);
}

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

template <typename T>
__device__ inline T narrow(float value) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// Words of global memory as one access. The compiler of a GPU takes an assignment of four words apart, but not this.
__device__ inline void read(uint32_t (&to)[4], const void* from) {
  const uint4 words = *static_cast<const uint4*>(from);
  to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
}
__device__ inline void read(uint32_t (&to)[2], const void* from) {
  const uint2 words = *static_cast<const uint2*>(from);
  to[0] = words.x, to[1] = words.y;
}
__device__ inline void write(void* to, const uint32_t (&from)[4]) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
#else
  *static_cast<uint4*>(to) = {from[0], from[1], from[2], from[3]};
#endif
}
__device__ inline void write(void* to, const uint32_t (&from)[2]) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(to), "r"(from[0]), "r"(from[1]) : "memory");
#else
  *static_cast<uint2*>(to) = {from[0], from[1]};
#endif
}

// A lane's part of a row, as it lies in memory: it is widened where it is used, and takes no more registers till then.
// A lane whose span is empty holds what must not be used: zeros, or, so that vectors are loaded without a condition and
// go out one behind the other, the first columns of the row. It stores nothing.
template <typename T, int W, bool kVector>
struct Piece {
  T element[W];

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < W; ++j) element[j] = narrow<T>(0.f);
  }

  __device__ void load(const T* row, const Span<W, false>& span) {
#pragma unroll
    for (int j = 0; j < W; ++j) element[j] = span.has(j) ? row[span.column(j)] : narrow<T>(0.f);
  }

  __device__ void store(T* row, const Span<W, false>& span) const {
#pragma unroll
    for (int j = 0; j < W; ++j)
      if (span.has(j)) row[span.column(j)] = element[j];
  }

  __device__ float at(int j) const { return widen(element[j]); }
  __device__ void set(int j, float value) { element[j] = narrow<T>(value); }
};

template <typename T, int W>
struct Piece<T, W, true> {
  static constexpr int kBytes = W * sizeof(T) < 16 ? W * sizeof(T) : 16, kParts = W * sizeof(T) / kBytes;
  static constexpr bool kWhole = sizeof(T) == 4;
  uint32_t part[kParts][kBytes / 4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kParts * kBytes / 4; ++i) word(i) = 0;
  }

  __device__ void load(const T* row, const Span<W, true>& span) {
    const T* from = row + (span.any() ? span.first : 0);
#pragma unroll
    for (int i = 0; i < kParts; ++i) read(part[i], from + i * (W / kParts));
  }

  __device__ void store(T* row, const Span<W, true>& span) const {
    if (!span.any()) return;
#pragma unroll
    for (int i = 0; i < kParts; ++i) write(row + span.first + i * (W / kParts), part[i]);
  }

  __device__ float at(int j) const {
    if constexpr (kWhole) {
      return __uint_as_float(word(j));
    } else if constexpr (std::is_same_v<T, __half>) {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(word(j / 2) >> (j % 2 * 16))));
    } else {
      return __uint_as_float(j % 2 ? word(j / 2) & 0xffff0000u : word(j / 2) << 16);
    }
  }

  // In the order of j: an even one leaves its neighbour zero.
  __device__ void set(int j, float value) {
    if constexpr (kWhole) {
      word(j) = __float_as_uint(value);
    } else {
      uint32_t bits;
      if constexpr (std::is_same_v<T, __half>) {
        bits = __half_as_ushort(narrow<T>(value));
      } else {
        bits = __bfloat16_as_ushort(narrow<T>(value));
      }
      word(j / 2) = j % 2 ? word(j / 2) | bits << 16 : bits;
    }
  }

 private:
  __device__ uint32_t& word(int i) { return part[i / (kBytes / 4)][i % (kBytes / 4)]; }
  __device__ uint32_t word(int i) const { return part[i / (kBytes / 4)][i % (kBytes / 4)]; }
};

// Whether rows of T can be read W elements at once.
template <typename T>
bool is_aligned(const Rows<T>& rows, int64_t count, int width) {
  const int64_t bytes = std::min<int64_t>(16, width * sizeof(T));
  return reinterpret_cast<uintptr_t>(rows.data) % bytes == 0 &&
         (count <= 1 || rows.stride * static_cast<int64_t>(sizeof(T)) % bytes == 0);
}

// The indices [G, k] into a pool of experts. What is beyond the pool is read as its nearest expert: no index makes a
// kernel leave memory that is its own.
struct ChoicesOnDevice {
  const void* indices;
  bool wide;  // int64, else int32
  int experts, k;

  __device__ int operator[](int64_t position) const {
    const int64_t index =
        wide ? static_cast<const int64_t*>(indices)[position] : static_cast<const int32_t*>(indices)[position];
    return static_cast<int>(index < 0 ? 0 : index < experts ? index : experts - 1);
  }
};

// Tiles of at most R rows of one group, the `length` rows that share their choices; R = 1 is for groups of one row.
struct RowTile {
  int64_t group, first;
  int rows;
};

struct RowTiles {
  int64_t groups, length, per_group, count;

  RowTiles(int64_t groups, int64_t length, int R)
      : groups(groups), length(length), per_group((length + R - 1) / R), count(groups * per_group) {}

  int64_t rows() const { return groups * length; }

  template <int R>
  __device__ RowTile at(int64_t tile) const {
    if constexpr (R == 1) {
      return {tile, tile, 1};
    } else {
      const int64_t group = tile / per_group, begin = (tile - group * per_group) * R;
      return {group, group * length + begin, static_cast<int>(length - begin < R ? length - begin : R)};
    }
  }
};

// Of the 2·kCount values that each lane still holds, it keeps half, with those of the lane that keeps the other half.
template <int kCount, int N>
__device__ inline void halve(float (&values)[N], int lane) {
  if constexpr (kCount > 0) {
    constexpr int kStep = kLanes * kCount / N;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float low = values[i], high = values[i + kCount];
      values[i] = (lane & kStep ? high : low) + __shfl_xor_sync(kAllLanes, lane & kStep ? low : high, kStep);
    }
    halve<kCount / 2>(values, lane);
  }
}

// Sums of N values over the lanes of a warp, in N - 1 exchanges and one for each doubling from N to kLanes. Lane l gets
// the sum of value l / (kLanes / N).
template <int N>
__device__ inline float sum_over_lanes(float (&values)[N], int lane) {
  halve<N / 2>(values, lane);
  float sum = values[0];
#pragma unroll
  for (int step = kLanes / N / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

// Blocks for so many tasks, `teams` of which a block does at once: more than a GPU holds, fewer than a grid may have.
inline unsigned blocks_for(int64_t tasks, int teams) {
  return static_cast<unsigned>(std::min<int64_t>((tasks + teams - 1) / teams, 1 << 30));
}

// Warps that must be at work before work is no longer split further.
inline int64_t enough_warps(int multiprocessors) { return static_cast<int64_t>(multiprocessors) * 16; }

}  // namespace
}  // namespace clora_kernels
