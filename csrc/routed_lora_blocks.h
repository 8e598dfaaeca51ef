// The inner loops of routed LoRA on a CPU, over blocks of a big operand: `count` rows or columns of it are converted to
// fp32 and masked in the first cache, once for all ranks. Every sum has one order, that of its index; long ones are made
// in pieces, for in one chain of additions the rounding errors of a thousand terms of one sign add up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "dropout_mask.h"
#include "matrix.h"
#include "philox.h"
#include "simd.h"

namespace clora_kernels {

constexpr int64_t kRows = 6;             // of accumulators: 6 × 2 vectors, and operands, fit into 16 registers
constexpr int64_t kWidth = 2 * kLanes;   // columns of accumulators
constexpr int64_t kBlockColumns = 512;   // of the big operand in a block of kRows rows
constexpr int64_t kReduceRows = 32;      // of the big operand in a block of kReduceColumns columns
constexpr int64_t kReduceColumns = 128;
constexpr int64_t kLongestChain = 128;   // of additions in a sum
constexpr int64_t kBlocksPerPiece = 32;  // of kReduceRows rows

// A draw of drop(x), or none: element (row, column) is kept if its 16-bit lane reaches the threshold.
struct Mask {
  bool given = false;
  uint32_t key_low = 0, key_high = 0, threshold = 0;
  int64_t groups_per_row = 0;
  int64_t first_row = 0;
};

// Zeros what drops of the `count` elements of a row from `column` on, a multiple of kGroup.
CLORA_INLINE void drop(const Mask& mask, int64_t row, int64_t column, int64_t count, float* values) {
  if (!mask.given) return;
  const auto first = static_cast<uint64_t>((mask.first_row + row) * mask.groups_per_row + column / kGroup);
  const int64_t groups = (count + kGroup - 1) / kGroup;
  alignas(64) uint32_t words[2 * kBlockColumns / kGroup];
  const uint32_t key_low = mask.key_low, key_high = mask.key_high, threshold = mask.threshold;
#pragma omp simd
  for (int64_t i = 0; i < groups; ++i) {
    const KeptBytes bytes = kept_group(first + static_cast<uint64_t>(i), key_low, key_high, threshold);
    words[2 * i] = bytes.first_four;
    words[2 * i + 1] = bytes.last_four;
  }
  const auto* kept = reinterpret_cast<const uint8_t*>(words);
  for (int64_t k = 0; k < count; ++k) values[k] *= static_cast<float>(kept[k]);
}

// `count` elements of a row as fp32, dropped.
template <typename T>
CLORA_INLINE void read_row(const Matrix<T>& big, const Mask& mask, int64_t row, int64_t column, int64_t count,
                           float* out) {
  const typename T::Storage* source = big.data + row * big.row_stride + column * big.column_stride;
  if (big.column_stride == 1) {
    for (int64_t k = 0; k < count; ++k) out[k] = T::from(source[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) out[k] = T::from(source[k * big.column_stride]);
  }
  drop(mask, row, column, count, out);
}

// acc [kRows, kWidth] = Σ_i a[i·a_step + row·a_row] · b[i·b_step ..]
CLORA_INLINE void multiply(int64_t count, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                           Vector (&acc)[kRows][2]) {
  for (int64_t row = 0; row < kRows; ++row) acc[row][0] = acc[row][1] = Vector{};
  for (int64_t i = 0; i < count; ++i) {
    const Vector low = at(b + i * b_step), high = at(b + i * b_step + kLanes);
#pragma GCC unroll 6
    for (int64_t row = 0; row < kRows; ++row) {
      const float factor = a[i * a_step + row * a_row];
      acc[row][0] += factor * low;
      acc[row][1] += factor * high;
    }
  }
}

struct Shrink {
  int64_t r, tiles;
  const float* small;  // [tiles][K][kWidth], zeros beyond r
  float* out;
};

template <typename T>
CLORA_INLINE void shrink_rows(const Matrix<T>& big, const Mask& mask, const Shrink& s, int64_t begin, int64_t end) {
  alignas(64) float rows[kRows][kBlockColumns];
  std::vector<float> sums(static_cast<size_t>(s.tiles * kRows * kWidth));
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t count = std::min(kRows, end - first);
    if (count < kRows) std::memset(rows, 0, sizeof(rows));
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t column = 0; column < big.columns; column += kBlockColumns) {
      const int64_t width = std::min(kBlockColumns, big.columns - column);
      for (int64_t i = 0; i < count; ++i) read_row(big, mask, first + i, column, width, rows[i]);
      for (int64_t tile = 0; tile < s.tiles; ++tile) {
        float* tile_sums = sums.data() + tile * kRows * kWidth;
        const float* factors = s.small + (tile * big.columns + column) * kWidth;
        for (int64_t k = 0; k < width; k += kLongestChain) {
          Vector acc[kRows][2];
          multiply(std::min(kLongestChain, width - k), rows[0] + k, kBlockColumns, 1, factors + k * kWidth, kWidth, acc);
          for (int64_t i = 0; i < kRows; ++i) {
            for (int64_t j = 0; j < 2; ++j) at(tile_sums + i * kWidth + j * kLanes) += acc[i][j];
          }
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < s.r; ++j) {
        s.out[(first + i) * s.r + j] = sums[static_cast<size_t>((j / kWidth * kRows + i) * kWidth + j % kWidth)];
      }
    }
  }
}

struct Reduce {
  int64_t r, padded;   // padded to a multiple of kRows
  const float* small;  // [M][padded], zeros beyond r
  float* out;
};

// total += sums, sums = 0
CLORA_INLINE void move_to(std::vector<float>& total, std::vector<float>& sums) {
  for (size_t i = 0; i < sums.size(); ++i) {
    total[i] += sums[i];
    sums[i] = 0.0f;
  }
}

template <typename T>
CLORA_INLINE void reduce_columns(const Matrix<T>& big, const Mask& mask, const Reduce& s, int64_t begin, int64_t end) {
  alignas(64) float block[kReduceRows][kReduceColumns];
  const auto size = static_cast<size_t>(s.padded * kReduceColumns);
  std::vector<float> sums(size), total(size);
  for (int64_t column = begin * kReduceColumns; column < std::min(end * kReduceColumns, big.columns);
       column += kReduceColumns) {
    const int64_t width = std::min(kReduceColumns, big.columns - column);
    if (width < kReduceColumns) std::memset(block, 0, sizeof(block));
    std::fill(sums.begin(), sums.end(), 0.0f);
    std::fill(total.begin(), total.end(), 0.0f);
    for (int64_t first = 0; first < big.rows; first += kReduceRows) {
      if (first % (kBlocksPerPiece * kReduceRows) == 0) move_to(total, sums);
      const int64_t count = std::min(kReduceRows, big.rows - first);
      for (int64_t i = 0; i < count; ++i) read_row(big, mask, first + i, column, width, block[i]);
      for (int64_t rank = 0; rank < s.padded; rank += kRows) {
        for (int64_t chunk = 0; chunk < width; chunk += kWidth) {
          float* tile_sums = sums.data() + rank * kReduceColumns + chunk;
          Vector acc[kRows][2];
          multiply(count, s.small + first * s.padded + rank, 1, s.padded, block[0] + chunk, kReduceColumns, acc);
          for (int64_t i = 0; i < kRows; ++i) {
            for (int64_t j = 0; j < 2; ++j) at(tile_sums + i * kReduceColumns + j * kLanes) += acc[i][j];
          }
        }
      }
    }
    move_to(total, sums);
    for (int64_t rank = 0; rank < s.r; ++rank) {
      std::copy_n(total.data() + rank * kReduceColumns, width, s.out + rank * big.columns + column);
    }
  }
}

struct Expand {
  int64_t r, padded_columns;
  const float* small;  // [M][r]
  const float* C;      // [r][padded_columns]
  bool accumulate;
};

template <typename T>
CLORA_INLINE void write_row(const float* sums, bool accumulate, int64_t count, typename T::Storage* out) {
  if (accumulate) {
    for (int64_t j = 0; j < count; ++j) out[j] = T::to(T::from(out[j]) + sums[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) out[j] = T::to(sums[j]);
  }
}

template <typename T>
CLORA_INLINE void expand_rows(const Matrix<T>& y, const Mask& mask, const Expand& s, int64_t begin, int64_t end) {
  alignas(64) float sums[kRows][kBlockColumns];
  std::vector<float> factors(static_cast<size_t>(kRows * s.r));
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t count = std::min(kRows, end - first);
    std::fill(factors.begin(), factors.end(), 0.0f);
    std::copy_n(s.small + first * s.r, count * s.r, factors.data());
    for (int64_t column = 0; column < y.columns; column += kBlockColumns) {
      const int64_t width = std::min(kBlockColumns, y.columns - column);
      for (int64_t chunk = 0; chunk < width; chunk += kWidth) {
        Vector acc[kRows][2];
        multiply(s.r, factors.data(), s.r, 1, s.C + column + chunk, s.padded_columns, acc);
        for (int64_t i = 0; i < kRows; ++i) {
          for (int64_t j = 0; j < 2; ++j) at(sums[i] + chunk + j * kLanes) = acc[i][j];
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        drop(mask, first + i, column, width, sums[i]);
        write_row<T>(sums[i], s.accumulate, width, y.data + (first + i) * y.row_stride + column);
      }
    }
  }
}

}  // namespace clora_kernels
