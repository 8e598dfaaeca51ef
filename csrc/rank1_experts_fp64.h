// The operators of rank-1 experts in fp64, which derivatives are checked in: plain loops.
#pragma once

#include "rank1_experts_kernels.h"

namespace clora_kernels {
namespace {

constexpr int64_t kBlock = 256;  // columns

struct Doubles {
  double* data;
  int64_t row_stride;

  CLORA_INLINE double* row(int64_t i) const { return data + i * row_stride; }
};

Doubles doubles(const Tensor& t) { return {static_cast<double*>(t.data_ptr()), t.stride(0)}; }

CLORA_CLONES void shrink_fp64(const Choices& c, const Indices& indices, const Doubles& big, const Doubles& experts,
                              int64_t n, int64_t begin, int64_t end, double* out) {
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t i = 0; i < c.k; ++i) {
      const double *left = big.row(m), *right = experts.row(indices[m / c.length * c.k + i]);
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) sum += left[j] * right[j];
      out[m * c.k + i] = sum;
    }
  }
}

CLORA_CLONES void expand_fp64(const Choices& c, const Indices& indices, const double* small, const Doubles& experts,
                              const Doubles& base, const Doubles& y, int64_t n, int64_t begin, int64_t end) {
  double sums[kBlock];
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t left = 0; left < n; left += kBlock) {
      const int64_t width = std::min(kBlock, n - left);
      std::fill_n(sums, width, 0.0);
      for (int64_t i = 0; i < c.k; ++i) {
        const double* row = experts.row(indices[m / c.length * c.k + i]) + left;
        const double factor = small[m * c.k + i];
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) sums[j] += factor * row[j];
      }
      for (int64_t j = 0; j < width; ++j) {
        y.row(m)[left + j] = base.data == nullptr ? sums[j] : base.row(m)[left + j] + sums[j];
      }
    }
  }
}

CLORA_CLONES void reduce_fp64(const Choices& c, const int32_t* order, const int32_t* starts, const double* small,
                              const Doubles& big, const Doubles& out, int64_t left, int64_t width) {
  double sums[kBlock];
  for (int64_t expert = 0; expert < c.experts; ++expert) {
    std::fill_n(sums, width, 0.0);
    for (int64_t p = starts[expert]; p < starts[expert + 1]; ++p) {
      const int64_t group = order[p] / c.k, slot = order[p] % c.k;
      for (int64_t m = group * c.length; m < (group + 1) * c.length; ++m) {
        const double* row = big.row(m) + left;
        const double factor = small[m * c.k + slot];
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) sums[j] += factor * row[j];
      }
    }
    std::copy_n(sums, width, out.row(expert) + left);
  }
}

}  // namespace
}  // namespace clora_kernels
