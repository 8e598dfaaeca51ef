// Blocks of rows of a matrix as fp32 panels in the caches, and back, whatever the matrix' element type and strides.
//
// A panel lies by rows, padded to kPad columns (tile.h), or, of few columns, by columns: [columns, padded to kFew][ld], so
// that vectors go along the rows and no lane is idle. Rows are padded to kPad with zeros in both.
#pragma once

#include <cstring>

#include "matrix.h"
#include "tile.h"

namespace clora_kernels {

typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));

constexpr int64_t kFew = 4;  // columns of a tile of a panel by columns

CLORA_INLINE int64_t padded_few(int64_t columns) { return (columns + kFew - 1) / kFew * kFew; }

// Eight vectors as the rows of an 8×8 matrix, transposed.
CLORA_INLINE void transpose(Vector (&m)[8]) {
  Vector a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = __builtin_shufflevector(m[i], m[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    a[i + 1] = __builtin_shufflevector(m[i], m[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
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

// Eight elements as a vector, and back.
template <typename T>
CLORA_INLINE void load(const typename T::Storage* from, Vector& to) {
  alignas(32) float values[8];
  for (int64_t i = 0; i < 8; ++i) values[i] = T::from(from[i]);
  to = at(values);
}
template <>
CLORA_INLINE void load<Float32>(const float* from, Vector& to) {
  to = at(from);
}
template <>
CLORA_INLINE void load<BFloat16>(const uint16_t* from, Vector& to) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  to = reinterpret_cast<Vector>(__builtin_convertvector(halves, Words) << 16);
}

template <typename T>
CLORA_INLINE void store(const Vector& from, typename T::Storage* to) {
  alignas(32) float values[8];
  at(values) = from;
  for (int64_t i = 0; i < 8; ++i) to[i] = T::to(values[i]);
}
template <>
CLORA_INLINE void store<Float32>(const Vector& from, float* to) {
  at(to) = from;
}
template <>
CLORA_INLINE void store<BFloat16>(const Vector& from, uint16_t* to) {
  const Words bits = reinterpret_cast<Words>(from);
  const Words rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const Words is_nan = reinterpret_cast<Words>((bits & 0x7FFFFFFFu) > 0x7F800000u);
  const Halves halves = __builtin_convertvector((is_nan & (bits >> 16 | 0x40u)) | (~is_nan & rounded), Halves);
  std::memcpy(to, &halves, sizeof(halves));
}

// A run of elements as fp32, and back.
template <typename T>
CLORA_INLINE void widen(const typename T::Storage* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) load<T>(from + i, at(to + i));
  for (; i < count; ++i) to[i] = T::from(from[i]);
}

template <typename T>
CLORA_INLINE void narrow(const float* from, int64_t count, typename T::Storage* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) store<T>(at(from + i), to + i);
  for (; i < count; ++i) to[i] = T::to(from[i]);
}

// Eight runs of eight elements, `stride` apart, become eight rows of a panel, `ld` apart, across them.
template <typename T>
CLORA_INLINE void read_across(const typename T::Storage* from, int64_t stride, float* to, int64_t ld) {
  Vector block[8];
#pragma GCC unroll 8
  for (int64_t v = 0; v < 8; ++v) load<T>(from + v * stride, block[v]);
  transpose(block);
#pragma GCC unroll 8
  for (int64_t v = 0; v < 8; ++v) at(to + v * ld) = block[v];
}

template <typename T>
CLORA_INLINE void write_across(const float* from, int64_t ld, typename T::Storage* to, int64_t stride) {
  Vector block[8];
#pragma GCC unroll 8
  for (int64_t v = 0; v < 8; ++v) block[v] = at(from + v * ld);
  transpose(block);
#pragma GCC unroll 8
  for (int64_t v = 0; v < 8; ++v) store<T>(block[v], to + v * stride);
}

// A panel [n, m] whose runs of m elements are contiguous, `ld` apart, from elements `outer` and `inner` apart in memory.
template <typename T>
CLORA_INLINE void read_panel(const typename T::Storage* from, int64_t n, int64_t m, int64_t outer, int64_t inner,
                             float* panel, int64_t ld) {
  if (inner == 1) {
    for (int64_t i = 0; i < n; ++i) widen<T>(from + i * outer, m, panel + i * ld);
    return;
  }
  const int64_t whole_n = outer == 1 ? n / 8 * 8 : 0, whole_m = m / 8 * 8;
  for (int64_t j = 0; j < whole_m; j += 8) {
    for (int64_t i = 0; i < whole_n; i += 8) read_across<T>(from + i + j * inner, inner, panel + i * ld + j, ld);
  }
  for (int64_t j = whole_m; j < m; ++j) {
    for (int64_t i = 0; i < whole_n; ++i) panel[i * ld + j] = T::from(from[i + j * inner]);
  }
  for (int64_t i = whole_n; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) panel[i * ld + j] = T::from(from[i * outer + j * inner]);
  }
}

template <typename T>
CLORA_INLINE void write_panel(const float* panel, int64_t ld, int64_t n, int64_t m, int64_t outer, int64_t inner,
                              typename T::Storage* to) {
  if (inner == 1) {
    for (int64_t i = 0; i < n; ++i) narrow<T>(panel + i * ld, m, to + i * outer);
    return;
  }
  const int64_t whole_n = outer == 1 ? n / 8 * 8 : 0, whole_m = m / 8 * 8;
  for (int64_t j = 0; j < whole_m; j += 8) {
    for (int64_t i = 0; i < whole_n; i += 8) write_across<T>(panel + i * ld + j, ld, to + i + j * inner, inner);
  }
  for (int64_t j = whole_m; j < m; ++j) {
    for (int64_t i = 0; i < whole_n; ++i) to[i + j * inner] = T::to(panel[i * ld + j]);
  }
  for (int64_t i = whole_n; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) to[i * outer + j * inner] = T::to(panel[i * ld + j]);
  }
}

// Four columns of eight rows that follow each other in memory, and back.
template <typename T>
CLORA_INLINE void read_four(const typename T::Storage* from, float* panel, int64_t ld) {
  Vector a, b, c, d;
  load<T>(from, a);
  load<T>(from + 8, b);
  load<T>(from + 16, c);
  load<T>(from + 24, d);
  const Vector ab = __builtin_shufflevector(a, b, 0, 4, 8, 12, 1, 5, 9, 13);
  const Vector cd = __builtin_shufflevector(c, d, 0, 4, 8, 12, 1, 5, 9, 13);
  at(panel) = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11);
  at(panel + ld) = __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15);
  const Vector AB = __builtin_shufflevector(a, b, 2, 6, 10, 14, 3, 7, 11, 15);
  const Vector CD = __builtin_shufflevector(c, d, 2, 6, 10, 14, 3, 7, 11, 15);
  at(panel + 2 * ld) = __builtin_shufflevector(AB, CD, 0, 1, 2, 3, 8, 9, 10, 11);
  at(panel + 3 * ld) = __builtin_shufflevector(AB, CD, 4, 5, 6, 7, 12, 13, 14, 15);
}

template <typename T>
CLORA_INLINE void write_four(const float* panel, int64_t ld, typename T::Storage* to) {
  const Vector a = at(panel), b = at(panel + ld), c = at(panel + 2 * ld), d = at(panel + 3 * ld);
  const Vector low_ab = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  const Vector low_cd = __builtin_shufflevector(c, d, 0, 8, 1, 9, 2, 10, 3, 11);
  const Vector high_ab = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  const Vector high_cd = __builtin_shufflevector(c, d, 4, 12, 5, 13, 6, 14, 7, 15);
  store<T>(__builtin_shufflevector(low_ab, low_cd, 0, 1, 8, 9, 2, 3, 10, 11), to);
  store<T>(__builtin_shufflevector(low_ab, low_cd, 4, 5, 12, 13, 6, 7, 14, 15), to + 8);
  store<T>(__builtin_shufflevector(high_ab, high_cd, 0, 1, 8, 9, 2, 3, 10, 11), to + 16);
  store<T>(__builtin_shufflevector(high_ab, high_cd, 4, 5, 12, 13, 6, 7, 14, 15), to + 24);
}

// Rows `row` .. `row` + n of a matrix as a panel by rows.
template <typename T>
CLORA_INLINE void read_rows(const Matrix<T>& m, int64_t row, int64_t n, float* panel, int64_t ld) {
  read_panel<T>(m.data + row * m.row_stride, n, m.columns, m.row_stride, m.column_stride, panel, ld);
  const int64_t width = padded(m.columns);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = m.columns; j < width; ++j) panel[i * ld + j] = 0.0f;
  }
  for (int64_t i = n; i < padded(n); ++i) std::fill_n(panel + i * ld, width, 0.0f);
}

template <typename T>
CLORA_INLINE void write_rows(const float* panel, int64_t ld, const Matrix<T>& m, int64_t row, int64_t n) {
  write_panel<T>(panel, ld, n, m.columns, m.row_stride, m.column_stride, m.data + row * m.row_stride);
}

// The same as a panel by columns.
template <typename T>
CLORA_INLINE void read_columns(const Matrix<T>& m, int64_t row, int64_t n, float* panel, int64_t ld) {
  const typename T::Storage* from = m.data + row * m.row_stride;
  int64_t done = 0;
  if (m.columns == 4 && m.column_stride == 1 && m.row_stride == 4) {
    for (; done + 8 <= n; done += 8) read_four<T>(from + done * 4, panel + done, ld);
  }
  read_panel<T>(from + done * m.row_stride, m.columns, n - done, m.column_stride, m.row_stride, panel + done, ld);
  for (int64_t j = 0; j < m.columns; ++j) {
    for (int64_t i = n; i < padded(n); ++i) panel[j * ld + i] = 0.0f;
  }
  for (int64_t j = m.columns; j < padded_few(m.columns); ++j) std::fill_n(panel + j * ld, padded(n), 0.0f);
}

template <typename T>
CLORA_INLINE void write_columns(const float* panel, int64_t ld, const Matrix<T>& m, int64_t row, int64_t n) {
  typename T::Storage* to = m.data + row * m.row_stride;
  int64_t done = 0;
  if (m.columns == 4 && m.column_stride == 1 && m.row_stride == 4) {
    for (; done + 8 <= n; done += 8) write_four<T>(panel + done, ld, to + done * 4);
  }
  write_panel<T>(panel + done, ld, m.columns, n - done, m.column_stride, m.row_stride, to + done * m.row_stride);
}

// sums [na / 4][nb / 4][16 vectors] += aᵀ·b of panels by columns; each lane sums the rows that it holds.
CLORA_INLINE void inner_columns(int64_t n, const float* a, int64_t na, const float* b, int64_t nb, int64_t ld,
                                float* sums, bool upper) {
  for (int64_t i = 0; i < na; i += kFew) {
    for (int64_t j = upper ? i : 0; j < nb; j += kFew) {
      float* place = sums + (i * padded_few(nb) + j * kFew) * kLanes;
      Vector acc[kFew][kFew];
#pragma GCC unroll 16
      for (int64_t t = 0; t < kFew * kFew; ++t) acc[t / kFew][t % kFew] = Vector{};
      const float *left = a + i * ld, *right = b + j * ld;
      for (int64_t row = 0; row < n; row += kLanes) {
        Vector r[kFew];
#pragma GCC unroll 4
        for (int64_t v = 0; v < kFew; ++v) r[v] = at(right + v * ld + row);
#pragma GCC unroll 4
        for (int64_t u = 0; u < kFew; ++u) {
          const Vector l = at(left + u * ld + row);
#pragma GCC unroll 4
          for (int64_t v = 0; v < kFew; ++v) acc[u][v] += l * r[v];
        }
      }
#pragma GCC unroll 16
      for (int64_t t = 0; t < kFew * kFew; ++t) at(place + t * kLanes) += acc[t / kFew][t % kFew];
    }
  }
}

// out [na, ldo] += the lanes of sums, which become zero.
CLORA_INLINE void gather_sums(int64_t na, int64_t nb, float* sums, double* out, int64_t ldo, bool upper) {
  for (int64_t i = 0; i < na; ++i) {
    for (int64_t j = upper ? i : 0; j < nb; ++j) {
      float* lanes = sums + ((i / kFew * kFew * padded_few(nb) + j / kFew * kFew * kFew) + i % kFew * kFew + j % kFew) * kLanes;
      double sum = 0;
      for (int64_t l = 0; l < kLanes; ++l) sum += static_cast<double>(lanes[l]);
      out[i * ldo + j] += sum;
      at(lanes) = Vector{};
    }
  }
}

// out [n, nb] = or += a [n, na] · x [na, nb], panels by columns, x by rows.
CLORA_INLINE void outer_columns(int64_t n, const float* a, int64_t na, const float* x, int64_t ldx, int64_t nb,
                                int64_t ld, float* out, Shape shape, bool add) {
  for (int64_t row = 0; row < n; row += 2 * kLanes) {
    const bool both = row + kLanes < n;
    const int64_t next = both ? kLanes : 0;  // the last eight rows alone are made twice
    for (int64_t j = 0; j < nb; j += kFew) {
      Vector acc[kFew][2];
#pragma GCC unroll 4
      for (int64_t v = 0; v < kFew; ++v) {
        const float* place = out + (j + v) * ld + row;
        acc[v][0] = add ? at(place) : Vector{};
        acc[v][1] = add ? at(place + next) : Vector{};
      }
      const int64_t last = shape == Shape::kUpper ? std::min(na, j + kFew) : na;
      for (int64_t i = shape == Shape::kLower ? j : 0; i < last; ++i) {
        const Vector first = at(a + i * ld + row), second = at(a + i * ld + row + next);
#pragma GCC unroll 4
        for (int64_t v = 0; v < kFew; ++v) {
          const float factor = x[i * ldx + j + v];
          acc[v][0] += factor * first;
          acc[v][1] += factor * second;
        }
      }
#pragma GCC unroll 4
      for (int64_t v = 0; v < kFew; ++v) {
        float* place = out + (j + v) * ld + row;
        at(place + next) = acc[v][1];
        at(place) = acc[v][0];
      }
    }
  }
}

}  // namespace clora_kernels
