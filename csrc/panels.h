// Blocks of rows of a matrix as fp32 panels in the caches, and back, whatever the matrix' element type and strides.
#pragma once

#include "matrix.h"
#include "tile.h"

namespace clora_kernels {

// Eight vectors as the rows of an 8×8 matrix, transposed.
CLORA_INLINE void transpose(Vector (&m)[8]) {
  Vector a[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = __builtin_shufflevector(m[i], m[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    a[i + 1] = __builtin_shufflevector(m[i], m[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  Vector b[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int j = i; j < i + 2; ++j) {
      b[j] = __builtin_shufflevector(a[j], a[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[j + 2] = __builtin_shufflevector(a[j], a[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    m[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    m[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

template <typename T>
CLORA_INLINE void widen(const typename T::Storage* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = T::from(from[i]);
}

template <typename T>
CLORA_INLINE void narrow(const float* from, int64_t count, typename T::Storage* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = T::to(from[i]);
}

// `rows` rows from `row` on as panel [rows, ld], zeros beyond the columns and, up to a multiple of kPad, the rows.
template <typename T>
CLORA_INLINE void read_rows(const Matrix<T>& m, int64_t row, int64_t rows, float* panel, int64_t ld) {
  using Storage = typename T::Storage;
  const int64_t c = m.columns, width = padded(c);
  const Storage* from = m.data + row * m.row_stride;
  if (m.column_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      float* to = panel + i * ld;
      switch (c) {
        case 4:
          widen<T>(from + i * m.row_stride, 4, to);
          break;
        case 8:
          widen<T>(from + i * m.row_stride, 8, to);
          break;
        case 16:
          widen<T>(from + i * m.row_stride, 16, to);
          break;
        default:
          widen<T>(from + i * m.row_stride, c, to);
      }
      for (int64_t j = c; j < width; ++j) to[j] = 0.0f;
    }
  } else {
    for (int64_t j = 0; j < width; j += 8) {
      int64_t i = 0;
      if (m.row_stride == 1 && j + 8 <= c) {
        for (; i + 8 <= rows; i += 8) {
          Vector block[8];
          for (int64_t v = 0; v < 8; ++v) {
            alignas(32) float column[8];
            widen<T>(from + i + (j + v) * m.column_stride, 8, column);
            block[v] = at(column);
          }
          transpose(block);
          for (int64_t v = 0; v < 8; ++v) at(panel + (i + v) * ld + j) = block[v];
        }
      }
      for (; i < rows; ++i) {
        for (int64_t v = j; v < j + 8; ++v) {
          panel[i * ld + v] = v < c ? T::from(from[i * m.row_stride + v * m.column_stride]) : 0.0f;
        }
      }
    }
  }
  for (int64_t i = rows; i < padded(rows); ++i) std::fill_n(panel + i * ld, width, 0.0f);
}

// The inverse: the first `rows` rows of the panel into the matrix, rounded once.
template <typename T>
CLORA_INLINE void write_rows(const float* panel, int64_t ld, const Matrix<T>& m, int64_t row, int64_t rows) {
  using Storage = typename T::Storage;
  const int64_t c = m.columns;
  Storage* to = m.data + row * m.row_stride;
  if (m.column_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = panel + i * ld;
      switch (c) {
        case 4:
          narrow<T>(from, 4, to + i * m.row_stride);
          break;
        case 8:
          narrow<T>(from, 8, to + i * m.row_stride);
          break;
        case 16:
          narrow<T>(from, 16, to + i * m.row_stride);
          break;
        default:
          narrow<T>(from, c, to + i * m.row_stride);
      }
    }
    return;
  }
  for (int64_t j = 0; j < c; j += 8) {
    int64_t i = 0;
    if (m.row_stride == 1 && j + 8 <= c) {
      for (; i + 8 <= rows; i += 8) {
        Vector block[8];
        for (int64_t v = 0; v < 8; ++v) block[v] = at(panel + (i + v) * ld + j);
        transpose(block);
        for (int64_t v = 0; v < 8; ++v) {
          alignas(32) float column[8];
          at(column) = block[v];
          narrow<T>(column, 8, to + i + (j + v) * m.column_stride);
        }
      }
    }
    for (; i < rows; ++i) {
      for (int64_t v = j; v < std::min(j + 8, c); ++v) {
        to[i * m.row_stride + v * m.column_stride] = T::to(panel[i * ld + v]);
      }
    }
  }
}

}  // namespace clora_kernels
