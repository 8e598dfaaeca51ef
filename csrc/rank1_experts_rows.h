// Rows of rank-1 experts on a CPU as fp32, and back, a step of columns at a time.
//
// A step of bf16 comes as its even columns and its odd ones, so that no element changes its lane: sums over a pool in
// bf16 are in this order until they are stored, and so is what its rows are multiplied with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "matrix.h"
#include "panels.h"

namespace clora_kernels {

constexpr int64_t kStep = 2 * kLanes;  // columns at a time

// Whether a step of T is its even columns, then its odd ones.
template <typename T>
constexpr bool kInPairs = std::is_same<T, BFloat16>::value;

CLORA_INLINE int64_t whole_steps(int64_t columns) { return (columns + kStep - 1) / kStep * kStep; }

// fp16 as fp32 by whole vectors, which compilers convert number by number: exponent and fraction moved to their places
// are the number times 2⁻¹¹², subnormal or not; infinity and NaN come out as 2¹⁶ and more, and want the rest of the
// exponent.
template <>
CLORA_INLINE void load<Float16>(const Float16::Storage* from, Vector& to) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Words bits = __builtin_convertvector(halves, Words);
  const Vector value = reinterpret_cast<Vector>((bits & 0x7FFFu) << 13) * 0x1p112f;
  const Words beyond = reinterpret_cast<Words>(value >= 0x1p16f) & 0x7F800000u;
  to = reinterpret_cast<Vector>(reinterpret_cast<Words>(value) | beyond | (bits & 0x8000u) << 16);
}

// kStep elements as fp32, in order or the even ones and the odd ones.
template <typename T, bool kPairs>
CLORA_INLINE void load_whole_step(const typename T::Storage* from, Vector& low, Vector& high) {
  if constexpr (kPairs && std::is_same<T, BFloat16>::value) {
    Words pairs;
    std::memcpy(&pairs, from, sizeof(pairs));
    low = reinterpret_cast<Vector>(pairs << 16);
    high = reinterpret_cast<Vector>(pairs & 0xFFFF0000u);
    return;
  }
  Vector a, b;
  load<T>(from, a);
  load<T>(from + kLanes, b);
  low = kPairs ? __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) : a;
  high = kPairs ? __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15) : b;
}

// The same of `count` elements and zeros, if there are no more: sums end with the steps they consist of, so that a
// compiler has no second way to round them.
template <typename T, bool kPairs>
CLORA_INLINE void load_step(const typename T::Storage* from, int64_t count, Vector& low, Vector& high) {
  if (count >= kStep) return load_whole_step<T, kPairs>(from, low, high);
  typename T::Storage values[kStep] = {};
  std::memcpy(values, from, static_cast<size_t>(count) * sizeof(values[0]));
  load_whole_step<T, kPairs>(values, low, high);
}

// A run of elements as fp32, up to a whole step of them, which are zeros beyond it.
template <typename T, bool kPairs>
CLORA_INLINE void widen_whole(const typename T::Storage* from, int64_t count, float* to) {
  for (int64_t j = 0; j < count; j += kStep) {
    load_step<T, kPairs>(from + j, count - j, at(to + j), at(to + j + kLanes));
  }
}

// Rows of a matrix whose element type is known when it runs.
struct AnyRows {
  void* data;
  ScalarType type;
  int64_t row_stride;

  template <typename T>
  CLORA_INLINE typename T::Storage* at(int64_t row, int64_t column) const {
    return static_cast<typename T::Storage*>(data) + row * row_stride + column;
  }

  AnyRows from_column(int64_t column) const {
    return {static_cast<char*>(data) + column * (type == ScalarType::Float ? 4 : 2), type, row_stride};
  }
};

// A part of a row on its way to the caches: rows a stride apart are nothing that prefetchers foresee either.
template <int kWrites>
CLORA_INLINE void fetch(const AnyRows& from, int64_t row, int64_t column, int64_t count) {
  constexpr int64_t kLine = 64;
  const int64_t size = from.type == ScalarType::Float ? 4 : 2;
  const char* data = static_cast<const char*>(from.data) + (row * from.row_stride + column) * size;
  for (int64_t at = 0; at < count * size; at += kLine) __builtin_prefetch(data + at, kWrites);
}

// `count` elements as fp32, in order or in pairs: where they lie, or in `scratch`.
template <bool kPairs>
CLORA_INLINE const float* as_fp32(const AnyRows& from, int64_t row, int64_t column, int64_t count, float* scratch) {
  if (from.type == ScalarType::BFloat16) {
    widen_whole<BFloat16, kPairs>(from.at<BFloat16>(row, column), count, scratch);
  } else if (from.type == ScalarType::Half) {
    widen_whole<Float16, kPairs>(from.at<Float16>(row, column), count, scratch);
  } else if (kPairs) {
    widen_whole<Float32, kPairs>(from.at<Float32>(row, column), count, scratch);
  } else {
    return from.at<Float32>(row, column);
  }
  return scratch;
}

// Zeroes whole rows or parts of them, a kilobyte at a time: for more, memset turns to string instructions, which a page
// that is touched for the first time costs dearly.
CLORA_INLINE void zero(const AnyRows& to, int64_t row, int64_t rows, int64_t column, int64_t count) {
  constexpr int64_t kBytes = 1024;
  const int64_t size = to.type == ScalarType::Float ? 4 : 2;
  if (count == to.row_stride) count *= rows, rows = 1;
  for (int64_t i = row; i < row + rows; ++i) {
    char* data = static_cast<char*>(to.data) + (i * to.row_stride + column) * size;
    for (int64_t at = 0; at < count * size; at += kBytes) {
      std::memset(data + at, 0, static_cast<size_t>(std::min(kBytes, count * size - at)));
    }
  }
}

// fp32 rounded to bf16, in the upper halves of words.
CLORA_INLINE void round_halves(const Vector& from, Words& to) {
  const Words bits = reinterpret_cast<Words>(from);
  const Words is_nan = reinterpret_cast<Words>((bits & 0x7FFFFFFFu) > 0x7F800000u);
  to = (is_nan & (bits | 0x400000u)) | (~is_nan & (bits + 0x7FFFu + (bits >> 16 & 1u)));
}

CLORA_INLINE void store_pairs(const Vector& even, const Vector& odd, uint16_t* to) {
  Words low, high;
  round_halves(even, low);
  round_halves(odd, high);
  const Words pairs = low >> 16 | (high & 0xFFFF0000u);
  std::memcpy(to, &pairs, sizeof(pairs));
}

// Whole steps of sums in pairs are in order afterwards.
CLORA_INLINE void unpair(const float* sums, Vector& low, Vector& high) {
  const Vector even = at(sums), odd = at(sums + kLanes);
  low = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
}

template <typename T, bool kPairs>
CLORA_INLINE void put(const float* sums, const typename T::Storage* base, int64_t count, typename T::Storage* to) {
  constexpr bool kStayPairs = kPairs && std::is_same<T, BFloat16>::value;
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) {
    Vector low = at(sums + j), high = at(sums + j + kLanes);
    if (kPairs && !kStayPairs) unpair(sums + j, low, high);
    if (base != nullptr) {
      Vector under_low, under_high;
      load_whole_step<T, kStayPairs>(base + j, under_low, under_high);
      low += under_low;
      high += under_high;
    }
    if constexpr (kStayPairs) {
      store_pairs(low, high, to + j);
    } else {
      store<T>(low, to + j);
      store<T>(high, to + j + kLanes);
    }
  }
  if (j == count) return;
  alignas(32) float rest[kStep];
  at(rest) = at(sums + j);
  at(rest + kLanes) = at(sums + j + kLanes);
  if (kPairs) unpair(sums + j, at(rest), at(rest + kLanes));
  for (int64_t i = 0; i < count - j; ++i) {
    to[j + i] = T::to(base == nullptr ? rest[i] : T::from(base[j + i]) + rest[i]);
  }
}

// sums, in whole steps, and a base under them where there is one, rounded into a row of `to`.
template <bool kPairs>
CLORA_INLINE void put_rounded(const float* sums, const AnyRows* base, int64_t row, int64_t column, int64_t count,
                              const AnyRows& to) {
  if (to.type == ScalarType::Float) {
    put<Float32, kPairs>(sums, base ? base->at<Float32>(row, column) : nullptr, count, to.at<Float32>(row, column));
  } else if (to.type == ScalarType::BFloat16) {
    put<BFloat16, kPairs>(sums, base ? base->at<BFloat16>(row, column) : nullptr, count,
                          to.at<BFloat16>(row, column));
  } else {
    put<Float16, kPairs>(sums, base ? base->at<Float16>(row, column) : nullptr, count, to.at<Float16>(row, column));
  }
}

}  // namespace clora_kernels
