// The r×r step of a sweep: what it does to the columns, and whether that is enough. The formulas and the bounds are
// those of clora_kernels/kernels/gram_schmidt/algebra.py.
#pragma once

#include <cstring>
#include <vector>

#include "small.h"

namespace clora_kernels {

enum State { kDone = 0, kAgain = 1, kHard = 2 };

constexpr double kEnough = 6.0, kStable = 0.01, kFaithful = 4.0;
constexpr double kRoundoff = 0x1p-24;   // of fp32, in which panels are summed
constexpr double kGramError = 1.0;      // of an entry of a Gram matrix of unit columns, in units of that
constexpr double kOfBasis = 8.0;        // what a basis may lack of being orthonormal, in units of that
constexpr double kLimit = 0x1p40;       // norms beyond it, or below its inverse, are left to fp64

// What a sweep does, W ← W·X + P·T (T with its sign), and the R it found.
struct Sweep {
  std::vector<float> X, T;
  std::vector<double> R;
};

// Columns of S [k, r] and G [r, r] are scaled to unit norm; false where a norm is out of bounds.
CLORA_INLINE bool equilibrate(int64_t k, int64_t r, int64_t ld, double* S, double* G, double* norms, double* scale) {
  for (int64_t j = 0; j < r; ++j) {
    norms[j] = std::sqrt(G[j * ld + j]);
    if (!(norms[j] > 1 / kLimit && norms[j] < kLimit)) return false;
    scale[j] = 1 / norms[j];
  }
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = i; j < r; ++j) G[i * ld + j] *= scale[i] * scale[j];
    for (int64_t j = 0; j < i; ++j) G[i * ld + j] = 0;
  }
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < r; ++j) S[i * ld + j] *= scale[j];
  }
  return true;
}

// S and G, as sums of panels' products, are used up: G becomes R. `scratch` holds (r + k + 4 + kSmallBlock)·ld numbers.
CLORA_INLINE State find_step(int64_t k, int64_t r, int64_t ld, double* S, double* G, double rank_tol, double* scratch,
                             float* x, float* t) {
  double *X = scratch, *T = X + r * ld, *norms = T + k * ld, *scale = norms + ld, *columns = scale + ld,
         *negated = columns + ld, *block = negated + ld;
  if (!equilibrate(k, r, ld, S, G, norms, scale)) return kHard;
  const double root = std::sqrt(static_cast<double>(r));
  const double of_unit = std::sqrt(2 * dot(r * ld, G, G) - static_cast<double>(r));
  for (int64_t i = 0; i < r; ++i) subtract(k, S + i, ld, S, ld, i / 4 * 4, ld, G + i * ld);
  if (!cholesky(r, ld, G, block)) return kHard;
  std::memset(X, 0, sizeof(double) * static_cast<size_t>((r + k) * ld));
  invert(r, ld, G, X, block);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t l = 0; l < r; ++l) negated[l] = -S[i * ld + l];
    for (int64_t first = 0; first < r; first += 4) {  // X is upper triangular
      subtract(std::min<int64_t>(4, r - first), negated + first, 1, X + first * ld, ld, first, ld, T + i * ld);
    }
  }
  double largest = 0, of_X = 0, of_T = 0;
  std::fill_n(columns, ld, 0.0);
  for (int64_t i = 0; i < r + k; ++i) {
    const double* row = X + i * ld;  // T follows X
    const double sum = dot(ld, row, row);
    largest = std::max(largest, sum);
    (i < r ? of_X : of_T) += sum;
    for (int64_t j = 0; j < ld; ++j) columns[j] += row[j] * row[j];
  }
  const double of_gram = kGramError * kRoundoff * of_unit * largest;
  const double error = of_gram + kRoundoff * (std::sqrt(of_X) + kOfBasis * std::sqrt(of_T));
  double worst = 0, pivot = G[0];
  std::fill_n(negated, ld, 0.0);
  for (int64_t i = 0; i < r; ++i) {
    pivot = std::min(pivot, G[i * ld + i]);
    for (int64_t j = i; j < r; ++j) negated[j] += columns[i] * G[i * ld + j] * G[i * ld + j];
  }
  for (int64_t j = 0; j < r; ++j) worst = std::max(worst, negated[j]);
  const bool sound = of_gram <= kStable && std::sqrt(worst) <= kFaithful * root && pivot > 1.1 * rank_tol;
  if (!sound) return kHard;
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < ld; ++j) x[i * ld + j] = static_cast<float>(X[i * ld + j] * scale[i]);
    for (int64_t j = i; j < r; ++j) G[i * ld + j] *= norms[j];
  }
  for (int64_t i = 0; i < k * ld; ++i) t[i] = -static_cast<float>(T[i]);
  return error <= kEnough * kRoundoff * root ? kDone : kAgain;
}

}  // namespace clora_kernels
