// r×r algebra in fp64: matrices are row-major, `ld` elements a row, ld = padded(r), what is beyond the columns is zero.
#pragma once

#include <cmath>

#include "tile.h"

namespace clora_kernels {

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

// The upper triangle of A [r, r] becomes R with RᵀR = A, below it zeros; false where a pivot is not positive.
CLORA_INLINE bool cholesky(int64_t r, int64_t ld, double* A) {
  for (int64_t i = 0; i < r; ++i) {
    double* row = A + i * ld;
    subtract(i, A + i, ld, A, ld, i / 4 * 4, ld, row);
    if (!(row[i] > 0)) return false;
    const double pivot = std::sqrt(row[i]), scale = 1 / pivot;
    for (int64_t j = 0; j < i; ++j) row[j] = 0;
    row[i] = pivot;
    for (int64_t j = i + 1; j < r; ++j) row[j] *= scale;
  }
  return true;
}

// X = R⁻¹ of an upper triangular R; X must come as zeros.
CLORA_INLINE void invert(int64_t r, int64_t ld, const double* R, double* X) {
  for (int64_t i = r - 1; i >= 0; --i) {
    double* row = X + i * ld;
    subtract(r - 1 - i, R + i * ld + i + 1, 1, X + (i + 1) * ld, ld, (i + 1) / 4 * 4, ld, row);
    const double scale = 1 / R[i * ld + i];
    for (int64_t j = i + 1; j < r; ++j) row[j] *= scale;
    row[i] = scale;
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
