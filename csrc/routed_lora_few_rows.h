// The inner loops of routed LoRA on a CPU that read their operands as they lie: converted copies of small ones, and
// products with rows so few that packing would take longer, which are a walk through the other operand.
#pragma once

#include "routed_lora_blocks.h"

namespace clora_kernels {

constexpr int64_t kFewRows = 8;  // up to here products do not pack the other operand

// Rows of a matrix as fp32 [rows][padded], dropped; what lies beyond its columns stays as it is.
template <typename T>
CLORA_INLINE void widen_rows(const Matrix<T>& m, const Mask& mask, int64_t padded, float* out) {
  for (int64_t row = 0; row < m.rows; ++row) {
    for (int64_t column = 0; column < m.columns; column += kBlockColumns) {
      const int64_t count = std::min(kBlockColumns, m.columns - column);
      read_row(m, mask, row, column, count, out + row * padded + column);
    }
  }
}

// Sixteen elements as fp32.
template <typename T>
CLORA_INLINE void read_chunk(const typename T::Storage* from, float* to) {
  for (int64_t i = 0; i < kWidth; ++i) to[i] = T::from(from[i]);
}

// small [r, K] → [tiles][K][kWidth]; the last tile may stay as it is beyond r.
template <typename T>
CLORA_INLINE void pack_tiles(const Matrix<T>& small, float* packed) {
  const int64_t r = small.rows, K = small.columns;
  for (int64_t first = 0; first < r; first += kWidth, packed += K * kWidth) {
    const int64_t ranks = std::min(kWidth, r - first);
    const typename T::Storage* source = small.data + first * small.row_stride;
    if (small.row_stride == 1) {
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t j = 0; j < ranks; ++j) packed[k * kWidth + j] = T::from(source[k * small.column_stride + j]);
      }
      continue;
    }
    for (int64_t begin = 0; begin < K; begin += kWidth) {
      const int64_t count = std::min(kWidth, K - begin);
      alignas(64) float tile[kWidth][kWidth] = {};
      for (int64_t j = 0; j < ranks; ++j) {
        const typename T::Storage* row = source + j * small.row_stride + begin * small.column_stride;
        for (int64_t k = 0; k < count; ++k) tile[j][k] = T::from(row[k * small.column_stride]);
      }
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t j = 0; j < kWidth; ++j) packed[(begin + k) * kWidth + j] = tile[j][k];
      }
    }
  }
}

// out [M][r] = a [M][K] · small [r, K]ᵀ for rows so few that packing would take longer; small has contiguous rows.
template <typename T>
CLORA_INLINE void dot_rows(const float* a, const Matrix<T>& small, int64_t M, float* out) {
  const int64_t K = small.columns;
  for (int64_t j = 0; j < small.rows; ++j) {
    const typename T::Storage* right = small.data + j * small.row_stride;
    Vector sums[kFewRows][2] = {};
    int64_t k = 0;
    for (; k + kWidth <= K; k += kWidth) {
      alignas(64) float chunk[kWidth];
      read_chunk<T>(right + k, chunk);
      for (int64_t row = 0; row < M; ++row) {
        sums[row][0] += at(a + row * K + k) * at(chunk);
        sums[row][1] += at(a + row * K + k + kLanes) * at(chunk + kLanes);
      }
    }
    for (int64_t row = 0; row < M; ++row) {
      float lanes[kLanes], sum = 0.0f;
      at(lanes) = sums[row][0] + sums[row][1];
      for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
      for (int64_t i = k; i < K; ++i) sum += a[row * K + i] * T::from(right[i]);
      out[row * small.rows + j] = sum;
    }
  }
}

// C [r][N] = s · small [N, r]ᵀ, rounded once; small has contiguous rows.
template <typename T>
CLORA_INLINE void transpose_rows(const Matrix<Float32>& small, float scale, typename T::Storage* out) {
  const int64_t N = small.rows, r = small.columns;
  for (int64_t first = 0; first < r; first += kWidth) {
    const int64_t ranks = std::min(kWidth, r - first);
    for (int64_t n = 0; n < N; n += kWidth) {
      const int64_t rows = std::min(kWidth, N - n);
      alignas(64) float tile[kWidth][kWidth];
      for (int64_t i = 0; i < rows; ++i) {
        const float* source = small.data + (n + i) * small.row_stride + first;
        for (int64_t j = 0; j < ranks; ++j) tile[j][i] = scale * source[j];
      }
      for (int64_t j = 0; j < ranks; ++j) write_row<T>(tile[j], false, rows, out + (first + j) * N + n);
    }
  }
}

// sums [M][kBlockColumns] += dy [M][N] · kStep rows of weight [N, K] from row n on, for columns begin .. end of K.
template <int64_t kM, int64_t kStep, typename T>
CLORA_INLINE void product_of_rows(const float* dy, const Matrix<T>& weight, int64_t n, int64_t begin, int64_t end,
                                  float* sums) {
  const int64_t N = weight.rows, width = end - begin, whole = width / kWidth * kWidth;
  const typename T::Storage* rows[kStep];
  float factors[kM][kStep];
  for (int64_t i = 0; i < kStep; ++i) {
    rows[i] = weight.data + (n + i) * weight.row_stride + begin;
    for (int64_t m = 0; m < kM; ++m) factors[m][i] = dy[m * N + n + i];
  }
  for (int64_t k = 0; k < whole; k += kWidth) {
    alignas(64) float chunk[kStep][kWidth];
    for (int64_t i = 0; i < kStep; ++i) read_chunk<T>(rows[i] + k, chunk[i]);
    for (int64_t m = 0; m < kM; ++m) {
      float* out = sums + m * kBlockColumns + k;
      Vector low = at(out), high = at(out + kLanes);
      for (int64_t i = 0; i < kStep; ++i) {
        low += factors[m][i] * at(chunk[i]);
        high += factors[m][i] * at(chunk[i] + kLanes);
      }
      at(out) = low;
      at(out + kLanes) = high;
    }
  }
  for (int64_t m = 0; m < kM; ++m) {
    for (int64_t i = 0; i < kStep; ++i) {
      for (int64_t k = whole; k < width; ++k) sums[m * kBlockColumns + k] += factors[m][i] * T::from(rows[i][k]);
    }
  }
}

// sums [M][K] += dy [M][N] · weight [N, K] for columns begin .. end of K, kBlockColumns at most, a few rows of the
// weight at a time, each read once and in the order of memory; weight has contiguous rows.
template <int64_t kM, typename T>
CLORA_INLINE void product_columns(const float* dy, const Matrix<T>& weight, int64_t begin, int64_t end, float* sums) {
  constexpr int64_t kStep = 4;
  alignas(64) float piece[kM][kBlockColumns];
  for (int64_t n = 0; n < weight.rows;) {
    std::memset(piece, 0, sizeof(piece));
    const int64_t last = std::min(n + kLongestChain, weight.rows);
    for (; n + kStep <= last; n += kStep) product_of_rows<kM, kStep>(dy, weight, n, begin, end, piece[0]);
    for (; n < last; ++n) product_of_rows<kM, 1>(dy, weight, n, begin, end, piece[0]);
    for (int64_t m = 0; m < kM; ++m) {
      for (int64_t k = begin; k < end; ++k) sums[m * weight.columns + k] += piece[m][k - begin];
    }
  }
}

// out [rows][columns] = factor · Σ_m a [m][row] · b [m][column] for rows begin .. end.
template <int64_t kM>
CLORA_INLINE void outer_rows(const float* a, const float* b, int64_t rows, int64_t columns, float factor, int64_t begin,
                             int64_t end, float* out) {
  const int64_t whole = columns / kWidth * kWidth;
  for (int64_t row = begin; row < end; ++row) {
    float* target = out + row * columns;
    for (int64_t k = 0; k < whole; k += kWidth) {
      Vector low{}, high{};
      for (int64_t m = 0; m < kM; ++m) {
        low += a[m * rows + row] * at(b + m * columns + k);
        high += a[m * rows + row] * at(b + m * columns + k + kLanes);
      }
      at(target + k) = factor * low;
      at(target + k + kLanes) = factor * high;
    }
    for (int64_t k = whole; k < columns; ++k) {
      float sum = 0.0f;
      for (int64_t m = 0; m < kM; ++m) sum += a[m * rows + row] * b[m * columns + k];
      target[k] = factor * sum;
    }
  }
}

}  // namespace clora_kernels
