#include "rank1_experts_bf16.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
// the intrinsics of gcc leave unset what they do not use
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdlib>

#define CLORA_BF16_TARGET __attribute__((target("arch=x86-64-v4,avx512bf16")))
#define CLORA_BF16_INLINE CLORA_INLINE CLORA_BF16_TARGET

namespace clora_kernels {
namespace {

constexpr int64_t kPairStep = 32;      // columns at a time
constexpr int64_t kPairRows = 8;       // of sums that are made together

CLORA_BF16_INLINE __m512bh load_pairs(const uint16_t* from, int64_t count) {
  if (count >= kPairStep) return (__m512bh)_mm512_loadu_si512(from);
  return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, from);
}

CLORA_BF16_INLINE bool row_is_ordinary(const uint16_t* row, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF), one = _mm512_set1_epi16(1);
  const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(BFloat16::to(kTiny) - 1));
  __mmask32 tiny = 0;
  for (int64_t j = 0; j < count; j += kPairStep) {
    const __m512i bits = _mm512_and_si512((__m512i)load_pairs(row + j, count - j), magnitude);
    tiny |= _mm512_cmplt_epu16_mask(_mm512_sub_epi16(bits, one), least);  // zeros become the largest
  }
  return tiny == 0;
}

// out[m·ldo + i] = the product of left[m·ld ..] and right[i].
template <int kM, int kI>
CLORA_BF16_INLINE void dot_pairs_tile(int64_t count, const uint16_t* left, int64_t ld, const uint16_t* const* right,
                                      float* out, int64_t ldo) {
  __m512 acc[kM * kI];
#pragma GCC unroll 16
  for (int t = 0; t < kM * kI; ++t) acc[t] = _mm512_setzero_ps();
  for (int64_t j = 0; j < count; j += kPairStep) {
    __m512bh rows[kM];
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) rows[m] = load_pairs(left + m * ld + j, count - j);
#pragma GCC unroll 4
    for (int i = 0; i < kI; ++i) {
      const __m512bh r = load_pairs(right[i] + j, count - j);
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) acc[m * kI + i] = _mm512_dpbf16_ps(acc[m * kI + i], rows[m], r);
    }
  }
  Vector halves[kM * kI][2];
#pragma GCC unroll 16
  for (int t = 0; t < kM * kI; ++t) {
    halves[t][0] = (Vector)_mm512_castps512_ps256(acc[t]);
    halves[t][1] = (Vector)_mm512_extractf32x8_ps(acc[t], 1);
  }
  add_lanes<kI>(halves, false, out, ldo);
}

template <int kM>
CLORA_BF16_INLINE void dot_pairs(int64_t count, const uint16_t* left, int64_t ld, const uint16_t* const* right,
                                 int64_t size, float* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) dot_pairs_tile<kM, 4>(count, left, ld, right + i, out + i, ldo);
  for (; i < size; ++i) dot_pairs_tile<kM, 1>(count, left, ld, right + i, out + i, ldo);
}

CLORA_BF16_INLINE __mmask16 mask_of(int64_t count) {
  return count >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1);
}

// Pairs of rows as one row of words: the elements of the first in the lower halves; zeros beyond `count`.
CLORA_BF16_INLINE void interleave(const uint16_t* first, const uint16_t* second, int64_t count, uint32_t* to) {
  for (int64_t j = 0; j < count; j += 16) {
    const __mmask16 mask = mask_of(count - j);
    __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first + j));
    if (second != nullptr) {
      const __m512i others = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second + j));
      words = _mm512_or_si512(words, _mm512_slli_epi32(others, 16));
    }
    _mm512_storeu_si512(to + j, words);
  }
}

// Sixteen numbers rounded to bf16.
CLORA_BF16_INLINE __m256i rounded(const float* from, __mmask16 mask) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from));
}

// sums[m·ld ..] = Σ_i factors[m·f_row + i·f_step] · rows[i·ld ..], both in pairs, for whole steps of 16 columns.
template <int kM, int kV>
CLORA_BF16_INLINE void combine_pairs_step(const uint32_t* rows, int64_t size, const uint32_t* factors, int64_t f_row,
                                          int64_t f_step, float* sums, int64_t ld) {
  __m512 acc[kM][kV];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) acc[m][v] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < size; ++i) {
    __m512bh row[kV];
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) row[v] = (__m512bh)_mm512_loadu_si512(rows + i * ld + v * 16);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(static_cast<int>(factors[m * f_row + i * f_step]));
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) acc[m][v] = _mm512_dpbf16_ps(acc[m][v], factor, row[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) _mm512_storeu_ps(sums + m * ld + v * 16, acc[m][v]);
  }
}

template <int kM>
CLORA_BF16_INLINE void combine_pairs(int64_t count, const uint32_t* rows, int64_t size, const uint32_t* factors,
                                     int64_t f_row, int64_t f_step, float* sums, int64_t ld) {
  int64_t j = 0;
  for (; j + 16 < count; j += 32) combine_pairs_step<kM, 2>(rows + j, size, factors, f_row, f_step, sums + j, ld);
  if (j < count) combine_pairs_step<kM, 1>(rows + j, size, factors, f_row, f_step, sums + j, ld);
}

// The same for any number of rows of sums.
CLORA_BF16_INLINE void combine_pairs_rows(int64_t count, const uint32_t* rows, int64_t size, const uint32_t* factors,
                                          int64_t f_row, int64_t f_step, int64_t number, float* sums, int64_t ld) {
  if (number == kPairRows) return combine_pairs<kPairRows>(count, rows, size, factors, f_row, f_step, sums, ld);
  int64_t m = 0;
  for (; m + 4 <= number; m += 4) combine_pairs<4>(count, rows, size, factors + m * f_row, f_row, f_step, sums + m * ld, ld);
  for (; m < number; ++m) combine_pairs<1>(count, rows, size, factors + m * f_row, f_row, f_step, sums + m * ld, ld);
}

// Factors of two rows, of kPairRows choices at most, in pairs.
CLORA_BF16_INLINE void pair_factors(const float* first, const float* second, int64_t count, uint32_t* to) {
  const __mmask16 mask = mask_of(count);
  __m512i words = _mm512_cvtepu16_epi32(rounded(first, mask));
  if (second != nullptr) {
    words = _mm512_or_si512(words, _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded(second, mask)), 16));
  }
  _mm512_mask_storeu_epi32(to, mask, words);
}

}  // namespace

bool has_bf16() {
  static const bool found = [] {
    const char* asked = std::getenv("CLORA_CPU_BF16");
    if (asked != nullptr && std::strcmp(asked, "0") == 0) return false;
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
  }();
  return found;
}

bool all_ordinary(const float* factors, int64_t count) {
  int64_t tiny = 0;
#pragma omp simd reduction(+ : tiny)
  for (int64_t i = 0; i < count; ++i) tiny += factors[i] != 0.0f && factors[i] < kTiny && factors[i] > -kTiny;
  return tiny == 0;
}

CLORA_BF16_TARGET bool all_ordinary(const Matrix<BFloat16>& m, int64_t begin, int64_t end) {
  bool ordinary = true;
  for (int64_t row = begin; row < end; ++row) ordinary &= row_is_ordinary(m.data + row * m.row_stride, m.columns);
  return ordinary;
}

CLORA_BF16_TARGET bool chosen_ordinary(const Matrix<BFloat16>& experts, const Choices& c, const Indices& indices) {
  bool ordinary = true;
  for (int64_t i = 0; i < c.groups * c.k; ++i) {
    ordinary &= row_is_ordinary(experts.data + indices[i] * experts.row_stride, experts.columns);
  }
  return ordinary;
}

CLORA_BF16_TARGET void shrink_pairs(const Matrix<BFloat16>& experts, const Shrink& s, int64_t begin, int64_t end) {
  const Choices& c = s.choices;
  const uint16_t* rows[kChain];
  const int64_t n = experts.columns, ld = s.big.row_stride;
  for (int64_t row = begin, run; row < end; row += run) {
    run = std::min((row / c.length + 1) * c.length, end) - row;
    find_rows(experts, c, s.indices, row / c.length * c.k, 0, c.k, rows);
    float* out = s.out + row * c.k;
    int64_t m = 0;
    for (; m + 4 <= run; m += 4) {
      dot_pairs<4>(n, s.big.at<BFloat16>(row + m, 0), ld, rows, c.k, out + m * c.k, c.k);
    }
    for (; m < run; ++m) dot_pairs<1>(n, s.big.at<BFloat16>(row + m, 0), ld, rows, c.k, out + m * c.k, c.k);
  }
}

CLORA_BF16_TARGET void expand_pairs(const Matrix<BFloat16>& experts, const Expand& s, int64_t begin, int64_t end) {
  const Choices& c = s.choices;
  const int64_t size = (c.k + 1) / 2;
  std::vector<uint32_t> panel(static_cast<size_t>(size * kNearColumns));
  alignas(64) float sums[kPairRows * kNearColumns];
  alignas(64) uint32_t factors[kPairRows * kChain / 2];
  const uint16_t* rows[kChain];
  for (int64_t row = begin, run; row < end; row += run) {
    run = std::min((row / c.length + 1) * c.length, end) - row;
    for (int64_t column = 0; column < experts.columns; column += kNearColumns) {
      const int64_t width = std::min(kNearColumns, experts.columns - column);
      find_rows(experts, c, s.indices, row / c.length * c.k, column, c.k, rows);
      for (int64_t i = 0; i < c.k; i += 2) {
        interleave(rows[i], i + 1 < c.k ? rows[i + 1] : nullptr, width, panel.data() + i / 2 * kNearColumns);
      }
      for (int64_t m = 0, number; m < run; m += number) {
        number = std::min(kPairRows, run - m);
        for (int64_t i = 0; i < number; ++i) {
          const float* small = s.small + (row + m + i) * c.k;
          for (int64_t j = 0; j < c.k; j += 16) {
            _mm256_storeu_si256((__m256i*)(factors + i * kChain / 2 + j / 2), rounded(small + j, mask_of(c.k - j)));
          }
        }
        combine_pairs_rows(width, panel.data(), size, factors, kChain / 2, 1, number, sums, kNearColumns);
        for (int64_t i = 0; i < number; ++i) {
          const float* sum = sums + i * kNearColumns;
          if (s.base != nullptr) {
            put_rounded<false>(sum, s.base, row + m + i, column, width, s.y);
            continue;
          }
          uint16_t* y = s.y.at<BFloat16>(row + m + i, column);
          for (int64_t j = 0; j < width; j += 16) {
            _mm256_mask_storeu_epi16(y + j, mask_of(width - j), rounded(sum + j, 0xFFFF));
          }
        }
      }
    }
  }
}

CLORA_BF16_TARGET void reduce_groups_pairs(const Matrix<BFloat16>& big, const Reduce& s, int64_t left, int64_t right,
                                           float* parts) {
  const Choices& c = s.choices;
  const int64_t width = right - left;
  alignas(64) uint32_t panel[kChain / 2 * kReduceColumns], factors[kChain / 2 * kPairRows];
  alignas(64) float chain[kPairRows * kReduceColumns];
  for (int64_t first = 0, rows; first < c.groups * c.length; first += rows) {
    const int64_t group = first / c.length, done = first % c.length;
    rows = std::min(kChain, c.length - done);
    for (int64_t i = 0; i < rows; i += 2) {
      const uint16_t* row = big.data + (first + i) * big.row_stride + left;
      interleave(row, i + 1 < rows ? row + big.row_stride : nullptr, width, panel + i / 2 * kReduceColumns);
    }
    for (int64_t i = 0, number; i < c.k; i += number) {
      number = std::min(kPairRows, c.k - i);
      for (int64_t m = 0; m < rows; m += 2) {
        const float* small = s.small + (first + m) * c.k + i;
        pair_factors(small, m + 1 < rows ? small + c.k : nullptr, number, factors + m / 2 * kPairRows);
      }
      float *place = parts + (group * c.k + i) * kReduceColumns, *sums = done > 0 ? chain : place;
      combine_pairs_rows(width, panel, (rows + 1) / 2, factors, 1, kPairRows, number, sums, kReduceColumns);
      if (done == 0) continue;
      for (int64_t m = 0; m < number; ++m) {
        for (int64_t j = 0; j < whole_steps(width); ++j) place[m * kReduceColumns + j] += chain[m * kReduceColumns + j];
      }
    }
  }
}

}  // namespace clora_kernels

#else

namespace clora_kernels {

bool has_bf16() { return false; }
bool all_ordinary(const float*, int64_t) { return false; }
bool all_ordinary(const Matrix<BFloat16>&, int64_t, int64_t) { return false; }
bool chosen_ordinary(const Matrix<BFloat16>&, const Choices&, const Indices&) { return false; }
void shrink_pairs(const Matrix<BFloat16>&, const Shrink&, int64_t, int64_t) {}
void expand_pairs(const Matrix<BFloat16>&, const Expand&, int64_t, int64_t) {}
void reduce_groups_pairs(const Matrix<BFloat16>&, const Reduce&, int64_t, int64_t, float*) {}

}  // namespace clora_kernels

#endif
