// r×r algebra in fp64: matrices are row-major, `ld` elements a row, ld = padded(r), what is beyond the columns is zero.
#pragma once

#include <cmath>

#include "tile.h"

namespace clora_kernels {

CLORA_INLINE double dot(int64_t count, const double* a, const double* b) {
  constexpr int64_t lanes = Simd<double>::lanes, kChains = 4;
  DoubleVector acc[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * lanes <= count; i += kChains * lanes) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < kChains; ++c) acc[c] += vector_at(a + i + c * lanes) * vector_at(b + i + c * lanes);
  }
  const DoubleVector sums = (acc[0] + acc[1]) + (acc[2] + acc[3]);
  double sum = 0;
  for (int64_t l = 0; l < lanes; ++l) sum += sums[l];
  for (; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// target[begin..end) -= Σ_l coefficients[l·step] · rows[l·ld + begin..end)
CLORA_INLINE void subtract(int64_t count, const double* coefficients, int64_t step, const double* rows, int64_t ld,
                           int64_t begin, int64_t end, double* target) {
  int64_t l = 0;
  for (; l + 4 <= count; l += 4) {
    const double* c = coefficients + l * step;
    const double c0 = c[0], c1 = c[step], c2 = c[2 * step], c3 = c[3 * step];
    const double *r0 = rows + l * ld, *r1 = r0 + ld, *r2 = r1 + ld, *r3 = r2 + ld;
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) target[j] -= c0 * r0[j] + c1 * r1[j] + c2 * r2[j] + c3 * r3[j];
  }
  for (; l < count; ++l) {
    const double c = coefficients[l * step];
    const double* row = rows + l * ld;
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) target[j] -= c * row[j];
  }
}

constexpr int64_t kSmallBlock = 32;  // rows that are eliminated before a product of panels does the rest

// The upper triangle of A [r, r] becomes R with RᵀR = A, below it zeros; false where a pivot is not positive. What is
// beyond the columns of A must be finite; `scratch` holds kSmallBlock·ld numbers.
CLORA_INLINE bool cholesky(int64_t r, int64_t ld, double* A, double* scratch) {
  for (int64_t first = 0; first < r; first += kSmallBlock) {
    const int64_t last = std::min(first + kSmallBlock, r);
    for (int64_t i = first; i < last; ++i) {
      double* row = A + i * ld;
      subtract(i - first, A + first * ld + i, ld, A + first * ld, ld, i / 4 * 4, ld, row);
      if (!(row[i] > 0)) return false;
      const double pivot = std::sqrt(row[i]), scale = 1 / pivot;
      for (int64_t j = 0; j < i; ++j) row[j] = 0;
      row[i] = pivot;
      for (int64_t j = i + 1; j < r; ++j) row[j] *= scale;
    }
    if (last == r) break;
    for (int64_t i = 0; i < kSmallBlock * ld; ++i) scratch[i] = -A[first * ld + i];
    inner_panels<double>(kSmallBlock, scratch + last, ld, r - last, A + first * ld + last, ld, r - last,
                         A + last * ld + last, ld, true);
  }
  return true;
}

// X = R⁻¹ of an upper triangular R; X must come as zeros.
CLORA_INLINE void invert(int64_t r, int64_t ld, const double* R, double* X, double* scratch) {
  for (int64_t first = (r - 1) / kSmallBlock * kSmallBlock; first >= 0; first -= kSmallBlock) {
    const int64_t last = std::min(first + kSmallBlock, r);
    if (last < r) {
      for (int64_t i = 0; i < kSmallBlock * ld; ++i) scratch[i] = -R[first * ld + i];
      outer_panels<double>(kSmallBlock, scratch + last, ld, r - last, X + last * ld + last, ld, r - last,
                           X + first * ld + last, ld, Shape::kUpper, true);
    }
    for (int64_t i = last - 1; i >= first; --i) {
      double* row = X + i * ld;
      subtract(last - 1 - i, R + i * ld + i + 1, 1, X + (i + 1) * ld, ld, (i + 1) / 4 * 4, ld, row);
      const double scale = 1 / R[i * ld + i];
      for (int64_t j = i + 1; j < r; ++j) row[j] *= scale;
      row[i] = scale;
    }
  }
}

// out [m, r] += sign · a [m, n] · b [n, r]; rows of b before the diagonal of a are left out with `upper`.
CLORA_INLINE void multiply(int64_t m, int64_t n, const double* a, int64_t lda, const double* b, int64_t ld, double sign,
                           bool upper, double* out, double* negated) {
  for (int64_t i = 0; i < m; ++i) {
    const int64_t first = upper ? std::min(i, n) : 0;
    for (int64_t l = first; l < n; ++l) negated[l] = -sign * a[i * lda + l];
    subtract(n - first, negated + first, 1, b + first * ld, ld, 0, ld, out + i * ld);
  }
}

}  // namespace clora_kernels
