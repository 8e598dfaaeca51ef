// What forward and backward of Gram-Schmidt share: matrices of any element type, blocks of their rows, and each inner
// loop as a plain function, which the loader picks a clone of.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "gram_schmidt_deflate.h"
#include "gram_schmidt_step.h"
#include "panels.h"

namespace clora_kernels {

// Rows of a block: a chain of additions of that length, and panels that stay in the caches.
constexpr int64_t kMostRows = 128, kLeastRows = 32, kPanelFloats = 16384;
// Rows whose products are summed by one thread, in fp32; fixed, so that no bit depends on the number of threads.
constexpr int64_t kSplitRows = 2048;

// A matrix of one of three element types.
struct Tall {
  void* data;
  ScalarType type;
  int64_t rows, columns, row_stride, column_stride;

  template <typename T>
  Matrix<T> as() const {
    return {static_cast<typename T::Storage*>(data), rows, columns, row_stride, column_stride};
  }
};

// Matrix `b` of a batch [B, d, columns].
inline Tall tall(const Tensor& t, int64_t b) {
  const auto size = t.scalar_type() == ScalarType::Float ? 4 : 2;
  return {static_cast<char*>(t.data_ptr()) + b * t.stride(0) * size, t.scalar_type(), t.size(1), t.size(2), t.stride(1),
          t.stride(2)};
}

// Distance of the rows of a panel: not a multiple of a power of two that would send them all to a few sets of the cache.
inline int64_t panel_ld(int64_t columns) {
  const int64_t ld = padded(columns);
  return ld >= 64 && ld % 16 == 0 ? ld + kPad : ld;
}

// The rows of a matrix by blocks, and blocks by splits.
struct Blocks {
  int64_t d, rows, splits;

  Blocks(int64_t length, int64_t columns) : d(length) {
    rows = std::max(kLeastRows, std::min(kMostRows, kPanelFloats / std::max<int64_t>(columns, 1) / kPad * kPad));
    splits = std::max<int64_t>((d + kSplitRows - 1) / kSplitRows, 1);
  }

  // body(first row, number of rows) for each block of a split.
  template <typename Body>
  void each(int64_t split, Body body) const {
    const int64_t end = std::min((split + 1) * kSplitRows, d);
    for (int64_t row = split * kSplitRows; row < end; row += rows) body(row, std::min(rows, end - row));
  }
};

namespace {

#define CLORA_PANELS(Type)                                                                                          \
  CLORA_CLONES void read(const Matrix<Type>& m, int64_t row, int64_t rows, float* panel, int64_t ld) {              \
    read_rows(m, row, rows, panel, ld);                                                                             \
  }                                                                                                                 \
  CLORA_CLONES void write(const float* panel, int64_t ld, const Matrix<Type>& m, int64_t row, int64_t rows) {       \
    write_rows(panel, ld, m, row, rows);                                                                            \
  }                                                                                                                 \
  CLORA_CLONES bool read_double(const Matrix<Type>& m, double* out, int64_t ld) { return widen_all(m, out, ld); }   \
  CLORA_CLONES void write_double(const double* from, int64_t ld, const Matrix<Type>& m) { narrow_all(from, ld, m); }

// All of a matrix in fp64; whether every element is finite.
template <typename T>
CLORA_INLINE bool widen_all(const Matrix<T>& m, double* out, int64_t ld) {
  double finite = 0;
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.columns; ++j) {
      const double value = T::from(m.data[i * m.row_stride + j * m.column_stride]);
      out[i * ld + j] = value;
      finite += value - value;  // NaN for Inf and NaN
    }
  }
  return finite == 0;
}

template <typename T>
CLORA_INLINE void narrow_all(const double* from, int64_t ld, const Matrix<T>& m) {
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.columns; ++j) {
      m.data[i * m.row_stride + j * m.column_stride] = T::to(static_cast<float>(from[i * ld + j]));
    }
  }
}

CLORA_PANELS(Float32)
CLORA_PANELS(BFloat16)
CLORA_PANELS(Float16)

#undef CLORA_PANELS

CLORA_CLONES void inner(int64_t rows, const float* a, int64_t lda, int64_t na, const float* b, int64_t ldb, int64_t nb,
                        float* out, int64_t ldo, bool upper) {
  inner_panels(rows, a, lda, na, b, ldb, nb, out, ldo, upper);
}

CLORA_CLONES void outer(int64_t rows, const float* a, int64_t lda, int64_t na, const float* x, int64_t ldx, int64_t nb,
                        float* out, int64_t ldo, bool upper, bool add) {
  outer_panels(rows, a, lda, na, x, ldx, nb, out, ldo, upper, add);
}

void read(const Tall& m, int64_t row, int64_t rows, float* panel, int64_t ld) {
  with_type(m.type, "matrix", [&](auto type) { read(m.as<decltype(type)>(), row, rows, panel, ld); });
}

void write(const float* panel, int64_t ld, const Tall& m, int64_t row, int64_t rows) {
  with_type(m.type, "matrix", [&](auto type) { write(panel, ld, m.as<decltype(type)>(), row, rows); });
}

}  // namespace
}  // namespace clora_kernels
