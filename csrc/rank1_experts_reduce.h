// reduce of rank-1 experts, each way to go through the choices: expert by expert, by blocks of rows, group by group.
#pragma once

#include "rank1_experts_choices.h"

namespace clora_kernels {

constexpr int64_t kReduceColumns = 128;  // that go through all experts together

struct Reduce {
  Choices choices;
  const int32_t *order, *starts;
  const float* small;  // [M][k], or null for ones
  AnyRows out;
};

template <typename T>
CLORA_INLINE AnyRows untyped(const Matrix<T>& m) {
  return {m.data, sizeof(typename T::Storage) == 4 ? ScalarType::Float : ScalarType::Half, m.row_stride};
}

// What reduce goes through: the choices of one expert, from `p` to `last` in order, each with its rows.
struct Walk {
  int64_t p, last, row;  // `row` of the group of p
};

// The next rows of a walk and their factors, `kChain` at most, and the rows that other walks begin with; their number.
template <typename T>
CLORA_INLINE int64_t take_rows(const Matrix<T>& big, const Reduce& s, int64_t column, Walk& walk,
                               const typename T::Storage** rows, float* factors) {
  const Choices& c = s.choices;
  const typename T::Storage* data = big.data + column;
  const auto k = static_cast<uint32_t>(c.k);
  int64_t size = 0;
  if (c.length == 1) {
    for (; size < kChain && walk.p < walk.last; ++size, ++walk.p) {
      const auto choice = static_cast<uint32_t>(s.order[walk.p]);
      rows[size] = data + choice / k * big.row_stride;
      factors[size] = s.small == nullptr ? 1.0f : s.small[choice];
    }
  } else {
    for (; size < kChain && walk.p < walk.last; ++size) {
      const auto choice = static_cast<uint32_t>(s.order[walk.p]);
      const int64_t row = choice / k * c.length + walk.row;
      rows[size] = data + row * big.row_stride;
      factors[size] = s.small[row * c.k + choice % k];
      if (++walk.row == c.length) walk.row = 0, ++walk.p;
    }
  }
  const int64_t final = c.groups * c.k - 1;
  for (int64_t i = 0; i < kAhead; ++i) {
    const auto choice = static_cast<uint32_t>(s.order[std::min(walk.p + i, final)]);
    rows[size + i] = data + choice / k * c.length * big.row_stride;
  }
  return size;
}

// sums of a walk that is not empty, in whole steps.
template <typename T>
CLORA_INLINE void combine_walk(const Matrix<T>& big, const Reduce& s, int64_t column, int64_t width, Walk walk,
                               float* sums) {
  alignas(64) float chain[kPiece], lost[kPiece];
  const typename T::Storage* rows[kChain + kAhead];
  float factors[kChain];
  const int64_t size = take_rows(big, s, column, walk, rows, factors);
  combine<T>(width, rows, size, factors, rows + kAhead, sums);
  if (walk.p == walk.last) return;
  std::fill_n(lost, whole_steps(width), 0.0f);
  while (walk.p < walk.last) {
    const int64_t more = take_rows(big, s, column, walk, rows, factors);
    combine<T>(width, rows, more, factors, rows + kAhead, chain);
    add_exactly(whole_steps(width), chain, sums, lost);
  }
}

// Rows of experts begin .. end of out.
template <typename T>
CLORA_INLINE void reduce_experts(const Matrix<T>& big, const Reduce& s, int64_t begin, int64_t end, int64_t left,
                                 int64_t right) {
  const bool none = s.choices.length == 0;
  alignas(64) float sums[kPiece];
  for (int64_t expert = begin; expert < end;) {
    const int64_t first = s.starts[expert];
    int64_t next = expert;
    while (next < end && (none || s.starts[next + 1] == first)) ++next;
    if (next > expert) {
      zero(s.out, expert, next - expert, left, right - left);
      expert = next;
      continue;
    }
    for (int64_t column = left; column < right; column += kPiece) {
      const int64_t width = std::min(kPiece, right - column);
      combine_walk(big, s, column, width, Walk{first, s.starts[expert + 1], 0}, sums);
      put_rounded<kInPairs<T>>(sums, nullptr, expert, column, width, s.out);
    }
    ++expert;
  }
}

// The same for all experts and kReduceColumns at most, for rows that choose alone: a block of rows that stays in the
// second cache serves all experts before the next one does. `sums` [experts][kReduceColumns], `at` [experts].
template <typename T>
CLORA_INLINE void reduce_blocks(const Matrix<T>& big, const Reduce& s, int64_t block, int64_t left, int64_t right,
                                float* sums, int32_t* at) {
  const Choices& c = s.choices;
  alignas(64) float part[kReduceColumns];
  const int64_t width = right - left;
  std::fill_n(sums, c.experts * kReduceColumns, 0.0f);
  std::copy_n(s.starts, c.experts, at);
  for (int64_t row = 0; row < c.groups; row += block) {
    const int64_t limit = std::min(row + block, c.groups) * c.k;
    for (int64_t i = row; i < std::min(row + block, c.groups); ++i) fetch<0>(untyped(big), i, left, width);
    for (int64_t expert = 0; expert < c.experts; ++expert) {
      const int64_t first = at[expert], last = s.starts[expert + 1];
      int64_t next = first;
      while (next < last && s.order[next] < limit) ++next;
      if (next == first) continue;
      at[expert] = static_cast<int32_t>(next);
      combine_walk(big, s, left, width, Walk{first, next, 0}, part);
      float* sum = sums + expert * kReduceColumns;
      for (int64_t j = 0; j < whole_steps(width); ++j) sum[j] += part[j];
    }
  }
  for (int64_t expert = 0; expert < c.experts; ++expert) {
    put_rounded<kInPairs<T>>(sums + expert * kReduceColumns, nullptr, expert, left, width, s.out);
  }
}

// parts [groups · k][kReduceColumns]: what each choice adds to its expert, for rows that share their choices. A tile of
// choices reads them once.
template <typename T>
CLORA_INLINE void reduce_groups(const Matrix<T>& big, const Reduce& s, int64_t left, int64_t right, float* parts) {
  const Choices& c = s.choices;
  const int64_t width = right - left;
  const bool as_they_lie = std::is_same<T, Float32>::value && width % kStep == 0;
  alignas(64) float panel[kChain * kReduceColumns], chain[kTile * kReduceColumns];
  for (int64_t first = 0, size; first < c.groups * c.length; first += size) {
    const int64_t group = first / c.length, done = first % c.length;
    size = std::min(kChain, c.length - done);
    const float* rows = panel;
    int64_t ld = kReduceColumns;
    if constexpr (std::is_same<T, Float32>::value) {
      if (as_they_lie) rows = big.data + first * big.row_stride + left, ld = big.row_stride;
    }
    for (int64_t i = 0; !as_they_lie && i < size; ++i) {
      widen_whole<T, false>(big.data + (first + i) * big.row_stride + left, width, panel + i * kReduceColumns);
    }
    for (int64_t i = first + size; i < std::min(first + size + kChain, c.groups * c.length); ++i) {
      fetch<0>(untyped(big), i, left, width);
    }
    const float* factors = s.small + first * c.k;
    for (int64_t i = 0, tile; i < c.k; i += tile) {
      tile = c.k - i >= kTile ? kTile : 1;
      float* place = parts + (group * c.k + i) * kReduceColumns;
      float* sums = done > 0 ? chain : place;
      if (tile == kTile) {
        combine_near<kTile>(width, rows, ld, size, factors + i, 1, c.k, sums, kReduceColumns);
      } else {
        combine_near<1>(width, rows, ld, size, factors + i, 1, c.k, sums, kReduceColumns);
      }
      if (done == 0) continue;
      for (int64_t j = 0; j < tile * kReduceColumns; ++j) place[j] += chain[j];
    }
  }
}

}  // namespace clora_kernels
