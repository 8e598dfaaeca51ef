// What forward and backward of Gram-Schmidt share: matrices of any element type, blocks of their rows, and each inner
// loop as a plain function, which the loader picks a clone of.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "gram_schmidt_deflate.h"
#include "gram_schmidt_step.h"
#include "panels.h"

namespace clora_kernels {

// Rows whose products are summed by one thread; fixed, so that no bit depends on the number of threads.
constexpr int64_t kSplitRows = 2048;

// Columns of V, and of P, up to which panels by columns are faster. One thread of a Zen 4, 16 matrices of 4096 rows, ms by
// columns and by rows: forward 0.5 and 0.9 for 6 columns, 1.1 and 1.7 for 16, 3.9 and 3.3 for 32; 2.9 and 2.9 for 16 beside
// 16, 8.1 and 7.0 beside 64; backward 2.7 and 3.5 for 16, 5.1 and 4.4 for 24, 7.7 and 11 for 16 beside 16.
constexpr int64_t kFewColumns = 16;

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

namespace {

#define CLORA_PANELS(Type)                                                                                          \
  CLORA_CLONES void read(const Matrix<Type>& m, int64_t row, int64_t n, float* panel, int64_t ld, bool by_rows) {   \
    by_rows ? read_rows(m, row, n, panel, ld) : read_columns(m, row, n, panel, ld);                                 \
  }                                                                                                                 \
  CLORA_CLONES void write(const float* panel, int64_t ld, const Matrix<Type>& m, int64_t row, int64_t n,            \
                          bool by_rows) {                                                                           \
    by_rows ? write_rows(panel, ld, m, row, n) : write_columns(panel, ld, m, row, n);                               \
  }

CLORA_PANELS(Float32)
CLORA_PANELS(BFloat16)
CLORA_PANELS(Float16)

#undef CLORA_PANELS

CLORA_CLONES void inner_by_rows(int64_t n, const float* a, int64_t lda, int64_t na, const float* b, int64_t ldb,
                                int64_t nb, float* out, int64_t ldo, bool upper) {
  inner_panels(n, a, lda, na, b, ldb, nb, out, ldo, upper);
}

CLORA_CLONES void outer_by_rows(int64_t n, const float* a, int64_t lda, int64_t na, const float* x, int64_t ldx,
                                int64_t nb, float* out, int64_t ldo, Shape shape, bool add) {
  outer_panels(n, a, lda, na, x, ldx, nb, out, ldo, shape, add);
}

CLORA_CLONES void inner_by_columns(int64_t n, const float* a, int64_t na, const float* b, int64_t nb, int64_t ld,
                                   float* sums, bool upper) {
  inner_columns(n, a, na, b, nb, ld, sums, upper);
}

CLORA_CLONES void outer_by_columns(int64_t n, const float* a, int64_t na, const float* x, int64_t ldx, int64_t nb,
                                   int64_t ld, float* out, Shape shape, bool add) {
  outer_columns(n, a, na, x, ldx, nb, ld, out, shape, add);
}

CLORA_CLONES void gather(int64_t na, int64_t nb, float* sums, double* out, int64_t ldo, bool upper) {
  gather_sums(na, nb, sums, out, ldo, upper);
}

// A panel, `ld` elements from row to row, or from column to column: in a buffer, or a matrix where it lies in memory.
struct Panel {
  float* data;
  int64_t ld;
};

// Panels by rows, for many columns. Fp32 sums run over the rows of a block, then over the blocks of a split.
struct ByRows {
  int64_t rows;  // of a block

  explicit ByRows(int64_t columns) {
    constexpr int64_t kMost = 32, kLeast = 32, kFloats = 16384;
    rows = std::max(kLeast, std::min(kMost, kFloats / std::max<int64_t>(columns, 1) / kPad * kPad));
  }

  // Distance of rows: not one that would send them all to a few sets of a cache.
  static int64_t ld(int64_t columns) {
    const int64_t width = padded(columns);
    return width >= 64 && width % 16 == 0 ? width + kPad : width;
  }
  int64_t floats(int64_t columns) const { return rows * ld(columns); }
  static int64_t floats_of_sums(int64_t na, int64_t nb) { return padded(na) * ld(nb); }
  static int64_t rows_of_sums() { return 256; }

  // Whether rows of a matrix can be worked on where they lie in memory.
  static bool is_panel(const Tall& m, int64_t n) {
    return m.type == ScalarType::Float && m.column_stride == 1 && m.columns % kPad == 0 && n % kPad == 0 && m.row_stride <= 64;
  }
  static Panel panel(int64_t columns, float* buffer) { return {buffer, ld(columns)}; }
  static Panel place(const Tall& m, int64_t row, int64_t n, float* buffer) {
    if (is_panel(m, n)) return {static_cast<float*>(m.data) + row * m.row_stride, m.row_stride};
    return panel(m.columns, buffer);
  }
  Panel read(const Tall& m, int64_t row, int64_t n, float* buffer) const {
    const Panel panel = place(m, row, n, buffer);
    if (is_panel(m, n)) return panel;
    with_type(m.type, "matrix", [&](auto type) {
      clora_kernels::read(m.as<decltype(type)>(), row, n, buffer, panel.ld, true);
    });
    return panel;
  }
  // `panel` was made in its place.
  void write(const Panel& panel, const Tall& m, int64_t row, int64_t n) const {
    if (is_panel(m, n)) return;
    with_type(m.type, "matrix", [&](auto type) {
      clora_kernels::write(panel.data, panel.ld, m.as<decltype(type)>(), row, n, true);
    });
  }
  void inner(int64_t n, const Panel& a, int64_t na, const Panel& b, int64_t nb, float* sums, bool upper) const {
    inner_by_rows(n, a.data, a.ld, na, b.data, b.ld, nb, sums, ld(nb), upper);
  }
  void outer(int64_t n, const Panel& a, int64_t na, const float* x, int64_t ldx, int64_t nb, const Panel& out,
             Shape shape, bool add) const {
    outer_by_rows(n, a.data, a.ld, na, x, ldx, nb, out.data, out.ld, shape, add);
  }
  // out [na, ldo] += sums, which become zero.
  void gather(int64_t na, int64_t nb, float* sums, double* out, int64_t ldo, bool upper) const {
    for (int64_t i = 0; i < na; ++i) {
      for (int64_t j = upper ? i : 0; j < nb; ++j) out[i * ldo + j] += static_cast<double>(sums[i * ld(nb) + j]);
    }
    std::fill_n(sums, floats_of_sums(na, nb), 0.0f);
  }
};

// Panels by columns, for few columns. Each lane sums every eighth row, for so long.
struct ByColumns {
  int64_t rows;

  explicit ByColumns(int64_t columns) {
    constexpr int64_t kMost = 256, kLeast = 64, kFloats = 4096;
    rows = kMost;
    while (rows > kLeast && rows * columns > kFloats) rows /= 2;
  }

  int64_t ld() const { return rows + 2 * kPad; }
  int64_t floats(int64_t columns) const { return padded_few(columns) * ld(); }
  static int64_t floats_of_sums(int64_t na, int64_t nb) { return padded_few(na) * padded_few(nb) * kLanes; }
  static int64_t rows_of_sums() { return 1024; }

  Panel panel(int64_t, float* buffer) const { return {buffer, ld()}; }
  Panel place(const Tall&, int64_t, int64_t, float* buffer) const { return {buffer, ld()}; }
  Panel read(const Tall& m, int64_t row, int64_t n, float* buffer) const {
    with_type(m.type, "matrix", [&](auto type) {
      clora_kernels::read(m.as<decltype(type)>(), row, n, buffer, ld(), false);
    });
    return {buffer, ld()};
  }
  void write(const Panel& panel, const Tall& m, int64_t row, int64_t n) const {
    with_type(m.type, "matrix", [&](auto type) {
      clora_kernels::write(panel.data, ld(), m.as<decltype(type)>(), row, n, false);
    });
  }
  void inner(int64_t n, const Panel& a, int64_t na, const Panel& b, int64_t nb, float* sums, bool upper) const {
    inner_by_columns(n, a.data, na, b.data, nb, ld(), sums, upper);
  }
  void outer(int64_t n, const Panel& a, int64_t na, const float* x, int64_t ldx, int64_t nb, const Panel& out,
             Shape shape, bool add) const {
    outer_by_columns(n, a.data, na, x, ldx, nb, ld(), out.data, shape, add);
  }
  void gather(int64_t na, int64_t nb, float* sums, double* out, int64_t ldo, bool upper) const {
    clora_kernels::gather(na, nb, sums, out, ldo, upper);
  }
};

// Whether the panels of V [B, d, r] beside k columns go by columns.
bool is_by_columns(const Tensor& V, int64_t k) {
  const int64_t r = V.size(2);
  return r <= kFewColumns && k <= kFewColumns && !ByRows::is_panel(tall(V, 0), kPad);
}

int64_t splits_of(int64_t d) { return std::max<int64_t>((d + kSplitRows - 1) / kSplitRows, 1); }

// body(first row, number of rows) for each block of `rows` rows of a split.
template <typename Body>
void each_block(int64_t d, int64_t split, int64_t rows, Body body) {
  const int64_t end = std::min((split + 1) * kSplitRows, d);
  for (int64_t row = split * kSplitRows; row < end; row += rows) body(row, std::min(rows, end - row));
}

}  // namespace
}  // namespace clora_kernels
