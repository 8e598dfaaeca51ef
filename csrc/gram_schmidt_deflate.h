// The columns one by one, in fp64, each projected twice on P and on the columns before it: right on any finite input.
// Columns go in groups of kPad, so that projections on what lies before a group are products of panels.
#pragma once

#include <cmath>
#include <cstring>

#include "small.h"

namespace clora_kernels {

constexpr int64_t kDeflateRows = 128;  // of a panel that stays in the first caches

// group [kPad][d] −= basis [d, m] · (basisᵀ·group), as rows of W [d, ld] from column m on; C [padded(m), kPad]: basisᵀ·group.
CLORA_INLINE void project(int64_t d, double* W, int64_t ld, int64_t m, double* C) {
  std::memset(C, 0, sizeof(double) * static_cast<size_t>(padded(m) * kPad));
  for (int64_t row = 0; row < d; row += kDeflateRows) {
    const int64_t rows = std::min(kDeflateRows, d - row);
    inner_panels<double>(rows, W + row * ld, ld, m, W + row * ld + m, ld, kPad, C, kPad, false);
  }
  for (int64_t i = 0; i < m * kPad; ++i) C[i] = -C[i];
  const int64_t whole = d / 4 * 4;
  outer_panels<double>(whole, W, ld, m, C, kPad, kPad, W + m, ld, Shape::kFull, true);
  for (int64_t row = whole; row < d; ++row) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < kPad; ++j) W[row * ld + m + j] += W[row * ld + i] * C[i * kPad + j];
    }
  }
  for (int64_t i = 0; i < m * kPad; ++i) C[i] = -C[i];
}

// The columns of a group [count][d] among themselves, after own[] were their norms; R [.., ldr] from (first, first) on.
CLORA_INLINE int64_t orthonormalise(int64_t d, int64_t count, double* group, const double* own, double rank_tol,
                                    double* R, int64_t ldr, int64_t first) {
  int64_t rank = 0;
  for (int64_t j = 0; j < count; ++j) {
    double* w = group + j * d;
    for (int64_t pass = 0; pass < 2; ++pass) {
      double c[kPad];
      for (int64_t i = 0; i < j; ++i) c[i] = dot(d, group + i * d, w);
      for (int64_t i = 0; i < j; ++i) {
        const double* q = group + i * d;
#pragma omp simd
        for (int64_t row = 0; row < d; ++row) w[row] -= c[i] * q[row];
        R[(first + i) * ldr + first + j] += c[i];
      }
    }
    const double norm = std::sqrt(dot(d, w, w));
    const bool kept = norm > rank_tol * own[j];
    const double scale = kept ? 1 / norm : 0.0;
    for (int64_t row = 0; row < d; ++row) w[row] = kept ? w[row] * scale : 0.0;
    R[(first + j) * ldr + first + j] = kept ? norm : 0.0;
    rank += kept;
  }
  return rank;
}

// W [d, ld] holds P in its first m = padded(k) columns, zeros beyond k, and V after it. Q takes the place of V; R [r, ldr]
// must come as zeros. Scratch: group [kPad][d], C [ld, kPad]. The rank.
CLORA_INLINE int64_t deflate_columns(int64_t d, int64_t m, int64_t r, double* W, int64_t ld, double rank_tol, double* R,
                                     int64_t ldr, double* group, double* C) {
  int64_t rank = 0;
  for (int64_t first = 0; first < r; first += kPad) {
    const int64_t count = std::min(kPad, r - first), place = m + first;
    double own[kPad] = {};
    for (int64_t row = 0; row < d; ++row) {
      for (int64_t j = 0; j < count; ++j) own[j] += W[row * ld + place + j] * W[row * ld + place + j];
    }
    for (int64_t j = 0; j < count; ++j) own[j] = std::sqrt(own[j]);
    for (int64_t pass = 0; pass < 2 && place > 0; ++pass) {
      project(d, W, ld, place, C);
      for (int64_t i = 0; i < first; ++i) {
        for (int64_t j = 0; j < count; ++j) R[i * ldr + first + j] += C[(m + i) * kPad + j];
      }
    }
    for (int64_t row = 0; row < d; ++row) {
      for (int64_t j = 0; j < count; ++j) group[j * d + row] = W[row * ld + place + j];
    }
    rank += orthonormalise(d, count, group, own, rank_tol, R, ldr, first);
    for (int64_t row = 0; row < d; ++row) {
      for (int64_t j = 0; j < count; ++j) W[row * ld + place + j] = group[j * d + row];
    }
  }
  return rank;
}

}  // namespace clora_kernels
