// The inner loops of rank-1 experts on a CPU: products of rows with chosen rows, and sums of chosen rows. The chosen
// rows are read where they lie, those that come next are fetched meanwhile: no prefetcher of a processor foresees them.
//
// Every sum has one order, whatever the block that makes it: a dot product is made in pieces of columns, each by kStep
// lanes that a tree adds up; a sum of rows in pieces of kChain of them.
#pragma once

#include <cstdint>

#include "rank1_experts_rows.h"

namespace clora_kernels {

constexpr int64_t kChain = 64;         // chosen rows in one chain of additions
constexpr int64_t kPiece = 512;        // columns of a block at most
constexpr int64_t kDotColumns = 512;   // columns of a piece of a dot product
constexpr int64_t kDotRows = 3;        // that share their choices and are multiplied together, with two of them
constexpr int64_t kTile = 4;           // choices of such rows that are summed up together

// to[i] = the sum of the lanes of v[i], by one tree.
CLORA_INLINE void sum_lanes(const Vector (&v)[4], float* to) {
  const Vector a = __builtin_shufflevector(v[0], v[1], 0, 8, 2, 10, 4, 12, 6, 14) +
                   __builtin_shufflevector(v[0], v[1], 1, 9, 3, 11, 5, 13, 7, 15);
  const Vector b = __builtin_shufflevector(v[2], v[3], 0, 8, 2, 10, 4, 12, 6, 14) +
                   __builtin_shufflevector(v[2], v[3], 1, 9, 3, 11, 5, 13, 7, 15);
  const Vector c = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
                   __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  for (int64_t i = 0; i < 4; ++i) to[i] = c[i] + c[4 + i];
}

// out[t / kI · ldo + t % kI] = or += the sum of the low and the high lanes of acc[t].
template <int kI, int kSize>
CLORA_INLINE void add_lanes(const Vector (&acc)[kSize][2], bool add, float* out, int64_t ldo) {
  constexpr int kRounded = (kSize + 3) / 4 * 4;
  float sums[kRounded];
#pragma GCC unroll 4
  for (int t = 0; t < kRounded; t += 4) {
    Vector four[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) four[u] = t + u < kSize ? acc[t + u][0] + acc[t + u][1] : Vector{};
    sum_lanes(four, sums + t);
  }
  for (int t = 0; t < kSize; ++t) {
    float* to = out + t / kI * ldo + t % kI;
    *to = add ? *to + sums[t] : sums[t];
  }
}

template <int kI, typename T>
CLORA_INLINE void dot_step(int64_t j, int64_t count, const float* left, const typename T::Storage* const* right,
                           const typename T::Storage* const* next, Vector (&acc)[kI][2]) {
  Vector low, high;
  load_step<Float32, false>(left + j, kInPairs<T> ? kStep : count, low, high);
#pragma GCC unroll 8
  for (int i = 0; i < kI; ++i) {
    Vector right_low, right_high;
    load_step<T, kInPairs<T>>(right[i] + j, count, right_low, right_high);
    __builtin_prefetch(next[i] + j);
    acc[i][0] += low * right_low;
    acc[i][1] += high * right_high;
  }
}

// out[i] = or += the product of `count` columns of left, in the order of T and for pairs in whole steps, and of
// right[i]; those of next[i] are fetched.
template <int kI, typename T>
CLORA_INLINE void dot_tile(int64_t count, const float* left, const typename T::Storage* const* right,
                           const typename T::Storage* const* next, bool add, float* out) {
  Vector acc[kI][2];
#pragma GCC unroll 8
  for (int i = 0; i < kI; ++i) acc[i][0] = acc[i][1] = Vector{};
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) dot_step<kI, T>(j, kStep, left, right, next, acc);
  if (j < count) dot_step<kI, T>(j, count - j, left, right, next, acc);
  add_lanes<kI>(acc, add, out, 0);
}

template <int kI, int kHalf>
CLORA_INLINE void dot_near_half(const float* left, int64_t ld, const float* const* right, int64_t j,
                                Vector (&acc)[kDotRows * kI][2]) {
  const Vector a = at(left + j + kHalf * kLanes), b = at(left + ld + j + kHalf * kLanes);
  const Vector c = at(left + 2 * ld + j + kHalf * kLanes);
#pragma GCC unroll 8
  for (int i = 0; i < kI; ++i) {
    const Vector r = at(right[i] + j + kHalf * kLanes);
    acc[i][kHalf] += a * r;
    acc[kI + i][kHalf] += b * r;
    acc[2 * kI + i][kHalf] += c * r;
  }
}

// The same for kDotRows rows left[m·ld ..] and rows in the caches: out[m·ldo + i]. A half of a step is done before the
// other is read, so that what is read stays in registers.
template <int kI>
CLORA_INLINE void dot_near_tile(int64_t count, const float* left, int64_t ld, const float* const* right, bool add,
                                float* out, int64_t ldo) {
  static_assert(kDotRows == 3, "dot_near_half has three");
  Vector acc[kDotRows * kI][2];
#pragma GCC unroll 8
  for (int t = 0; t < kDotRows * kI; ++t) acc[t][0] = acc[t][1] = Vector{};
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) {
    dot_near_half<kI, 0>(left, ld, right, j, acc);
    dot_near_half<kI, 1>(left, ld, right, j, acc);
  }
  if (j < count) {
    alignas(32) float rest[kDotRows + kI][kStep];
    const float* ends[kI];
#pragma GCC unroll 4
    for (int m = 0; m < kDotRows; ++m) widen_whole<Float32, false>(left + m * ld + j, count - j, rest[m]);
#pragma GCC unroll 8
    for (int i = 0; i < kI; ++i) {
      widen_whole<Float32, false>(right[i] + j, count - j, rest[kDotRows + i]);
      ends[i] = rest[kDotRows + i];
    }
    dot_near_half<kI, 0>(rest[0], kStep, ends, 0, acc);
    dot_near_half<kI, 1>(rest[0], kStep, ends, 0, acc);
  }
  add_lanes<kI>(acc, add, out, ldo);
}

template <int kI, typename T>
CLORA_INLINE void combine_step(int64_t j, int64_t count, const typename T::Storage* const* rows,
                               const float (&factors)[kI], const typename T::Storage* const* next, bool add,
                               float* sums) {
  Vector acc_low = add ? at(sums + j) : Vector{}, acc_high = add ? at(sums + j + kLanes) : Vector{};
#pragma GCC unroll 8
  for (int i = 0; i < kI; ++i) {
    Vector low, high;
    load_step<T, kInPairs<T>>(rows[i] + j, count, low, high);
    __builtin_prefetch(next[i] + j);
    acc_low += factors[i] * low;
    acc_high += factors[i] * high;
  }
  at(sums + j) = acc_low;
  at(sums + j + kLanes) = acc_high;
}

// sums = or += Σ_i factors[i] · `count` columns of rows[i]; those of next[i] are fetched. Up to a whole step of sums is
// written.
template <int kI, typename T>
CLORA_INLINE void combine_tile(int64_t count, const typename T::Storage* const* rows, const float* factors,
                               const typename T::Storage* const* next, bool add, float* sums) {
  float f[kI];
#pragma GCC unroll 8
  for (int i = 0; i < kI; ++i) f[i] = factors[i];
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) combine_step<kI, T>(j, kStep, rows, f, next, add, sums);
  if (j < count) combine_step<kI, T>(j, count - j, rows, f, next, add, sums);
}

// The same for `size` rows, kChain at most; `ahead` lists as many that come next, or is `rows` itself.
template <typename T>
CLORA_INLINE void combine(int64_t count, const typename T::Storage* const* rows, int64_t size, const float* factors,
                          const typename T::Storage* const* ahead, float* sums) {
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) combine_tile<4, T>(count, rows + i, factors + i, ahead + i, i > 0, sums);
  for (; i < size; ++i) combine_tile<1, T>(count, rows + i, factors + i, ahead + i, i > 0, sums);
}

// sums[m·ld ..] = Σ_i factors[m·f_row + i·f_step] · whole steps of rows[i·row_stride ..], for `size` rows, kChain at
// most, that lie in the caches: the additions of combine, with sums that stay in registers.
template <int kM>
CLORA_INLINE void combine_near(int64_t count, const float* rows, int64_t row_stride, int64_t size,
                               const float* factors, int64_t f_row, int64_t f_step, float* sums, int64_t ld) {
  for (int64_t j = 0; j < count; j += kStep) {
    Vector acc[kM][2];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) acc[m][0] = acc[m][1] = Vector{};
    for (int64_t i = 0; i < size; ++i) {
      const Vector low = at(rows + i * row_stride + j), high = at(rows + i * row_stride + j + kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const float factor = factors[m * f_row + i * f_step];
        acc[m][0] += factor * low;
        acc[m][1] += factor * high;
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      at(sums + m * ld + j) = acc[m][0];
      at(sums + m * ld + j + kLanes) = acc[m][1];
    }
  }
}

// sums += terms; what a sum loses by rounding is kept and added to the next term.
CLORA_INLINE void add_exactly(int64_t count, const float* terms, float* sums, float* lost) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const float term = terms[j] + lost[j], sum = sums[j] + term;
    lost[j] = term - (sum - sums[j]);
    sums[j] = sum;
  }
}

}  // namespace clora_kernels
