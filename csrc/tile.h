// Products of tall panels that lie in the caches, in fp32 or fp64: rows of a panel are contiguous, `ld` elements apart,
// and padded with numbers to a multiple of kPad columns, so that no tile needs an edge of its own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace clora_kernels {

typedef double DoubleVector __attribute__((vector_size(32), aligned(8)));

template <typename S>
struct Simd;
template <>
struct Simd<float> {
  using Vector = clora_kernels::Vector;
  static constexpr int64_t lanes = 8;
};
template <>
struct Simd<double> {
  using Vector = DoubleVector;
  static constexpr int64_t lanes = 4;
};

constexpr int64_t kPad = 8;

CLORA_INLINE int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

template <typename S>
CLORA_INLINE const typename Simd<S>::Vector& vector_at(const S* from) {
  return *reinterpret_cast<const typename Simd<S>::Vector*>(from);
}
template <typename S>
CLORA_INLINE typename Simd<S>::Vector& vector_at(S* to) {
  return *reinterpret_cast<typename Simd<S>::Vector*>(to);
}

// acc [kM, kV vectors] += Σ_i a[i·a_step + m·a_row] · b[i·b_step ..]
template <typename S, int64_t kM, int64_t kV>
CLORA_INLINE void accumulate(int64_t count, const S* a, int64_t a_row, int64_t a_step, const S* b, int64_t b_step,
                             typename Simd<S>::Vector (&acc)[kM][kV]) {
  constexpr int64_t lanes = Simd<S>::lanes;
  for (int64_t i = 0; i < count; ++i) {
    typename Simd<S>::Vector right[kV];
#pragma GCC unroll 4
    for (int64_t v = 0; v < kV; ++v) right[v] = vector_at(b + i * b_step + v * lanes);
#pragma GCC unroll 8
    for (int64_t m = 0; m < kM; ++m) {
      const S factor = a[i * a_step + m * a_row];
#pragma GCC unroll 4
      for (int64_t v = 0; v < kV; ++v) acc[m][v] += factor * right[v];
    }
  }
}

// out [kM, kV vectors] += the product, or = it.
template <typename S, int64_t kM, int64_t kV>
CLORA_INLINE void tile(int64_t count, const S* a, int64_t a_row, int64_t a_step, const S* b, int64_t b_step, S* out,
                       int64_t ldo, bool add) {
  constexpr int64_t lanes = Simd<S>::lanes;
  typename Simd<S>::Vector acc[kM][kV];
#pragma GCC unroll 8
  for (int64_t m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kV; ++v) acc[m][v] = typename Simd<S>::Vector{};
  }
  accumulate<S, kM, kV>(count, a, a_row, a_step, b, b_step, acc);
#pragma GCC unroll 8
  for (int64_t m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kV; ++v) {
      S* place = out + m * ldo + v * lanes;
      vector_at(place) = add ? vector_at(place) + acc[m][v] : acc[m][v];
    }
  }
}

// out [na, nb] += aᵀ·b over `rows` rows; with `upper` the elements below the diagonal are anything.
template <typename S>
CLORA_INLINE void inner_panels(int64_t rows, const S* a, int64_t lda, int64_t na, const S* b, int64_t ldb, int64_t nb,
                               S* out, int64_t ldo, bool upper) {
  constexpr int64_t lanes = Simd<S>::lanes;
  for (int64_t j = 0; j < nb;) {
    const bool wide = nb - j > lanes && !(upper && nb <= 2 * lanes);  // a quarter of a triangle's tile is spared
    const int64_t width = wide ? 2 * lanes : lanes, last = upper ? std::min(na, j + width) : na;
    if (wide) {
      for (int64_t i = 0; i < last; i += 4) {
        tile<S, 4, 2>(rows, a + i, 1, lda, b + j, ldb, out + i * ldo + j, ldo, true);
      }
    } else {
      for (int64_t i = 0; i < last; i += 8) {
        tile<S, 8, 1>(rows, a + i, 1, lda, b + j, ldb, out + i * ldo + j, ldo, true);
      }
    }
    j += width;
  }
}

// What is known to be zero in the small factor of a product.
enum class Shape { kFull, kUpper, kLower };

// out [rows, nb] = or += a [rows, na] · x [na, nb]. Rows are padded too.
template <typename S>
CLORA_INLINE void outer_panels(int64_t rows, const S* a, int64_t lda, int64_t na, const S* x, int64_t ldx, int64_t nb,
                               S* out, int64_t ldo, Shape shape, bool add) {
  constexpr int64_t lanes = Simd<S>::lanes;
  for (int64_t j = 0; j < nb;) {
    const bool wide = nb - j > lanes && !(shape == Shape::kUpper && nb <= 2 * lanes);
    const int64_t width = wide ? 2 * lanes : lanes;
    const int64_t first = shape == Shape::kLower ? std::min(j, na) : 0;
    const int64_t count = (shape == Shape::kUpper ? std::min(na, j + width) : na) - first;
    const S* factors = x + first * ldx + j;
    if (wide) {
      for (int64_t k = 0; k < rows; k += 4) {
        tile<S, 4, 2>(count, a + k * lda + first, lda, 1, factors, ldx, out + k * ldo + j, ldo, add);
      }
    } else {
      for (int64_t k = 0; k < rows; k += 8) {
        tile<S, 8, 1>(count, a + k * lda + first, lda, 1, factors, ldx, out + k * ldo + j, ldo, add);
      }
    }
    j += width;
  }
}

}  // namespace clora_kernels
