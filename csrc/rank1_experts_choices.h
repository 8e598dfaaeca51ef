// shrink and expand of rank-1 experts over a range of rows. The type of the pool is known to a compiler, that of the
// rows that choose is asked for where they are read.
#pragma once

#include <type_traits>
#include <vector>

#include "rank1_experts.h"
#include "rank1_experts_blocks.h"

namespace clora_kernels {

constexpr int64_t kAhead = 4;          // chosen rows that are on their way while one is worked on
constexpr int64_t kLeastRun = 8;       // rows with the same choices that are worth a panel of them
constexpr int64_t kNearColumns = 256;  // of such a panel, which stays in the first cache
constexpr int64_t kPanel = 1 << 16;    // numbers of a panel for dot products, which stays in the second

struct Indices {
  const void* data;
  bool wide;

  CLORA_INLINE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct Shrink {
  Choices choices;
  Indices indices;
  AnyRows big;
  float* out;  // [M][k]
};

struct Expand {
  Choices choices;
  Indices indices;
  const float* small;  // [M][k]
  const AnyRows* base;
  AnyRows y;
};

// Where the rows are that a group chooses, from choice `first` on, and of the choices that follow.
template <typename T>
CLORA_INLINE void find_rows(const Matrix<T>& experts, const Choices& c, const Indices& indices, int64_t first,
                            int64_t column, int64_t size, const typename T::Storage** rows) {
  const int64_t last = c.groups * c.k - 1;
  for (int64_t i = 0; i < size; ++i) {
    rows[i] = experts.data + indices[std::min(first + i, last)] * experts.row_stride + column;
  }
}

// The same rows as fp32 in a panel, in the order of T.
template <typename T>
CLORA_INLINE void widen_rows(int64_t count, const typename T::Storage* const* rows, int64_t size, float* panel,
                             int64_t ld) {
  for (int64_t i = 0; i < size; ++i) widen_whole<T, kInPairs<T>>(rows[i], count, panel + i * ld);
}

template <typename T>
CLORA_INLINE void dot_one(int64_t count, const float* left, const typename T::Storage* const* rows, int64_t size,
                          bool add, float* out) {
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) dot_tile<4, T>(count, left, rows + i, rows + i + kAhead, add, out + i);
  for (; i < size; ++i) dot_tile<1, T>(count, left, rows + i, rows + i + kAhead, add, out + i);
}

CLORA_INLINE void dot_near(int64_t count, const float* left, int64_t ld, const float* const* rows, int64_t size,
                           bool add, float* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + 2 <= size; i += 2) dot_near_tile<2>(count, left, ld, rows + i, add, out + i, ldo);
  for (; i < size; ++i) dot_near_tile<1>(count, left, ld, rows + i, add, out + i, ldo);
}

// A row alone.
template <typename T>
CLORA_INLINE void shrink_row(const Matrix<T>& experts, const Shrink& s, int64_t row, int64_t end, float* scratch) {
  const Choices& c = s.choices;
  const typename T::Storage* rows[kChain + kAhead];
  for (int64_t column = 0; column < experts.columns; column += kDotColumns) {
    const int64_t width = std::min(kDotColumns, experts.columns - column);
    if (row + kAhead < end) fetch<0>(s.big, row + kAhead, column, width);
    const float* x = as_fp32<kInPairs<T>>(s.big, row, column, width, scratch);
    for (int64_t first = 0; first < c.k; first += kChain) {
      const int64_t size = std::min(kChain, c.k - first);
      find_rows(experts, c, s.indices, row / c.length * c.k + first, column, size + kAhead, rows);
      dot_one<T>(width, x, rows, size, column > 0, s.out + row * c.k + first);
    }
  }
}

// `count` columns of kDotRows rows of one group with what it chooses, in fp32 at `near` and for pairs in whole steps.
template <typename T>
CLORA_INLINE void shrink_near(const Shrink& s, int64_t row, int64_t first, int64_t size, int64_t column, int64_t count,
                              const float* const* near, float* scratch) {
  const float* x = as_fp32<kInPairs<T>>(s.big, row, column, count, scratch);
  int64_t ld = s.big.row_stride;
  if (x == scratch) {
    ld = kDotColumns;
    for (int64_t i = 1; i < kDotRows; ++i) {
      as_fp32<kInPairs<T>>(s.big, row + i, column, count, scratch + i * kDotColumns);
    }
  }
  dot_near(kInPairs<T> ? whole_steps(count) : count, x, ld, near, size, column > 0, s.out + row * s.choices.k + first,
           s.choices.k);
}

// Rows of one group from `row` on, kDotRows at a time, which all read what it chooses in the caches, as it lies or from
// a panel; the number of rows that this leaves out.
template <typename T>
CLORA_INLINE int64_t shrink_run(const Matrix<T>& experts, const Shrink& s, int64_t row, int64_t run, int64_t block,
                                float* panel, float* scratch) {
  const Choices& c = s.choices;
  const typename T::Storage* rows[kChain];
  const float* near[kChain];
  for (int64_t left = 0; left < experts.columns; left += block) {
    const int64_t right = std::min(left + block, experts.columns);
    for (int64_t first = 0; first < c.k; first += kChain) {
      const int64_t size = std::min(kChain, c.k - first);
      find_rows(experts, c, s.indices, row / c.length * c.k + first, left, size, rows);
      constexpr bool kAsTheyLie = std::is_same<T, Float32>::value;
      if (!kAsTheyLie) widen_rows<T>(right - left, rows, size, panel, block);
      for (int64_t m = 0; m + kDotRows <= run; m += kDotRows) {
        for (int64_t column = left; column < right; column += kDotColumns) {
          const int64_t width = std::min(kDotColumns, right - column);
          for (int64_t i = m + kDotRows; i < std::min(m + 2 * kDotRows, run); ++i) {
            fetch<0>(s.big, row + i, column, width);
          }
          for (int64_t i = 0; i < size; ++i) {
            if constexpr (kAsTheyLie) {
              near[i] = rows[i] + (column - left);
            } else {
              near[i] = panel + i * block + (column - left);
            }
          }
          shrink_near<T>(s, row + m, first, size, column, width, near, scratch);
        }
      }
    }
  }
  return run % kDotRows;
}

// Columns of a panel of `size` rows.
CLORA_INLINE int64_t panel_columns(int64_t size, int64_t columns) {
  const int64_t most = std::max(kDotColumns, kPanel / std::max<int64_t>(size, 1) / kDotColumns * kDotColumns);
  return std::min(most, whole_steps(columns));
}

template <typename T>
CLORA_INLINE void shrink_rows(const Matrix<T>& experts, const Shrink& s, int64_t begin, int64_t end) {
  const Choices& c = s.choices;
  alignas(64) float scratch[kDotRows * kDotColumns];
  const bool near = c.length >= kDotRows;
  const int64_t size = std::min(kChain, c.k), block = panel_columns(size, experts.columns);
  std::vector<float> panel(static_cast<size_t>(near && !std::is_same<T, Float32>::value ? size * block : 0));
  for (int64_t row = begin, run; row < end; row += run) {
    run = std::min((row / c.length + 1) * c.length, end) - row;
    const int64_t rest = near ? shrink_run(experts, s, row, run, block, panel.data(), scratch) : run;
    for (int64_t m = run - rest; m < run; ++m) shrink_row(experts, s, row + m, end, scratch);
  }
}

// sums of all that a group chooses.
template <typename T>
CLORA_INLINE void combine_choices(int64_t width, const Matrix<T>& experts, const Expand& s, int64_t row, int64_t group,
                                  int64_t column, float* sums, float* chain) {
  const Choices& c = s.choices;
  const typename T::Storage* rows[kChain + kAhead];
  for (int64_t first = 0; first < c.k; first += kChain) {
    const int64_t size = std::min(kChain, c.k - first);
    find_rows(experts, c, s.indices, group * c.k + first, column, size + kAhead, rows);
    combine<T>(width, rows, size, s.small + row * c.k + first, rows + kAhead, first > 0 ? chain : sums);
    if (first == 0) continue;
    for (int64_t j = 0; j < whole_steps(width); ++j) sums[j] += chain[j];
  }
}

template <int kM, typename T>
CLORA_INLINE void expand_near(int64_t width, const Expand& s, int64_t row, int64_t column, const float* panel,
                              float* sums) {
  const int64_t k = s.choices.k;
  combine_near<kM>(width, panel, kNearColumns, k, s.small + row * k, k, 1, sums, kNearColumns);
  for (int64_t i = 0; i < kM; ++i) {
    put_rounded<kInPairs<T>>(sums + i * kNearColumns, s.base, row + i, column, width, s.y);
  }
}

// Rows of one group from `row` on, which all read a panel [k][kNearColumns] of what it chooses.
template <typename T>
CLORA_INLINE void expand_run(const Matrix<T>& experts, const Expand& s, int64_t row, int64_t run, float* panel) {
  const Choices& c = s.choices;
  const typename T::Storage* rows[kChain];
  alignas(64) float sums[6 * kNearColumns];
  for (int64_t column = 0; column < experts.columns; column += kNearColumns) {
    const int64_t width = std::min(kNearColumns, experts.columns - column);
    find_rows(experts, c, s.indices, row / c.length * c.k, column, c.k, rows);
    widen_rows<T>(width, rows, c.k, panel, kNearColumns);
    int64_t m = 0;
    for (; m + 6 <= run; m += 6) expand_near<6, T>(width, s, row + m, column, panel, sums);
    for (; m + 2 <= run; m += 2) expand_near<2, T>(width, s, row + m, column, panel, sums);
    for (; m < run; ++m) expand_near<1, T>(width, s, row + m, column, panel, sums);
  }
}

template <typename T>
CLORA_INLINE void expand_rows(const Matrix<T>& experts, const Expand& s, int64_t begin, int64_t end) {
  const Choices& c = s.choices;
  alignas(64) float sums[kPiece] = {}, chain[kPiece];
  const bool near = c.length >= kLeastRun && c.k <= kChain;
  std::vector<float> panel(static_cast<size_t>(near ? c.k * kNearColumns : 0));
  for (int64_t row = begin, run; row < end; row += run) {
    run = std::min((row / c.length + 1) * c.length, end) - row;
    if (near && run >= kLeastRun) {
      expand_run(experts, s, row, run, panel.data());
      continue;
    }
    run = 1;
    for (int64_t column = 0; column < experts.columns; column += kPiece) {
      const int64_t width = std::min(kPiece, experts.columns - column);
      if (row + kAhead < end) {
        fetch<1>(s.y, row + kAhead, column, width);
        if (s.base) fetch<0>(*s.base, row + kAhead, column, width);
      }
      combine_choices(width, experts, s, row, row / c.length, column, sums, chain);
      put_rounded<kInPairs<T>>(sums, s.base, row, column, width, s.y);
    }
  }
}

}  // namespace clora_kernels
