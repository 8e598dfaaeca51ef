// The skinny products of routed LoRA on the CPU: a big operand [M, K] against a small one of rank r, fp32 sums.
//
//   fold     out [r, N] = s · smallᵀ                           small [N, r]
//   shrink   out [M, r] = (mask ⊙ big) · smallᵀ                small [r, K]
//   reduce   out [r, K] = smallᵀ · (mask ⊙ big)                small [M, r]
//   expand_  y [M, N]   = mask ⊙ (small · C), or added to y    small [M, r], C [r, N]
//
// The big operand is read once, converted and masked a block at a time in the first cache. Every sum has one order, that
// of its index, whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "dropout_mask.h"
#include "philox.h"
#include "simd.h"

namespace clora_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRows = 6;               // of accumulators: 6 × 2 vectors, and operands, fit into 16 registers
constexpr int64_t kWidth = 2 * kLanes;     // columns of accumulators
constexpr int64_t kBlockColumns = 512;     // of the big operand in a block of kRows rows
constexpr int64_t kReduceRows = 32;        // of the big operand in a block of kReduceColumns columns
constexpr int64_t kReduceColumns = 128;
constexpr int64_t kFewRows = 8;            // up to here shrink does not pack its small operand
constexpr int64_t kFlopsPerThread = 1 << 19;  // less than this is not worth a second thread

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

// A matrix of T in memory with any strides.
template <typename T>
struct Matrix {
  using Storage = typename T::Storage;
  Storage* data;
  int64_t rows, columns, row_stride, column_stride;
};

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

// acc [kRows, kWidth] += Σ_i a[i·a_step + row·a_row] · b[i·b_step ..]
CLORA_INLINE void accumulate(int64_t count, const float* a, int64_t a_row, int64_t a_step, const float* b,
                             int64_t b_step, Vector (&acc)[kRows][2]) {
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
        Vector acc[kRows][2];
        for (int64_t i = 0; i < kRows; ++i) {
          for (int64_t j = 0; j < 2; ++j) acc[i][j] = at(tile_sums + i * kWidth + j * kLanes);
        }
        accumulate(width, rows[0], kBlockColumns, 1, s.small + (tile * big.columns + column) * kWidth, kWidth, acc);
        for (int64_t i = 0; i < kRows; ++i) {
          for (int64_t j = 0; j < 2; ++j) at(tile_sums + i * kWidth + j * kLanes) = acc[i][j];
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

template <typename T>
CLORA_INLINE void reduce_columns(const Matrix<T>& big, const Mask& mask, const Reduce& s, int64_t begin, int64_t end) {
  alignas(64) float block[kReduceRows][kReduceColumns];
  std::vector<float> sums(static_cast<size_t>(s.padded * kReduceColumns));
  for (int64_t column = begin * kReduceColumns; column < std::min(end * kReduceColumns, big.columns);
       column += kReduceColumns) {
    const int64_t width = std::min(kReduceColumns, big.columns - column);
    if (width < kReduceColumns) std::memset(block, 0, sizeof(block));
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t first = 0; first < big.rows; first += kReduceRows) {
      const int64_t count = std::min(kReduceRows, big.rows - first);
      for (int64_t i = 0; i < count; ++i) read_row(big, mask, first + i, column, width, block[i]);
      for (int64_t rank = 0; rank < s.padded; rank += kRows) {
        for (int64_t chunk = 0; chunk < width; chunk += kWidth) {
          float* tile_sums = sums.data() + rank * kReduceColumns + chunk;
          Vector acc[kRows][2];
          for (int64_t i = 0; i < kRows; ++i) {
            for (int64_t j = 0; j < 2; ++j) acc[i][j] = at(tile_sums + i * kReduceColumns + j * kLanes);
          }
          accumulate(count, s.small + first * s.padded + rank, 1, s.padded, block[0] + chunk, kReduceColumns, acc);
          for (int64_t i = 0; i < kRows; ++i) {
            for (int64_t j = 0; j < 2; ++j) at(tile_sums + i * kReduceColumns + j * kLanes) = acc[i][j];
          }
        }
      }
    }
    for (int64_t rank = 0; rank < s.r; ++rank) {
      std::memcpy(s.out + rank * big.columns + column, sums.data() + rank * kReduceColumns,
                  static_cast<size_t>(width) * sizeof(float));
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
    std::memcpy(factors.data(), s.small + first * s.r, static_cast<size_t>(count * s.r) * sizeof(float));
    for (int64_t column = 0; column < y.columns; column += kBlockColumns) {
      const int64_t width = std::min(kBlockColumns, y.columns - column);
      for (int64_t chunk = 0; chunk < width; chunk += kWidth) {
        Vector acc[kRows][2] = {};
        accumulate(s.r, factors.data(), s.r, 1, s.C + column + chunk, s.padded_columns, acc);
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

// small [r][K] → [tiles][K][kWidth]
CLORA_CLONES void pack_tiles(const float* small, int64_t r, int64_t K, float* packed) {
  for (int64_t first = 0; first < r; first += kWidth) {
    const int64_t count = std::min(kWidth, r - first);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < count; ++j) packed[k * kWidth + j] = small[(first + j) * K + k];
    }
    packed += K * kWidth;
  }
}

// Sixteen elements as fp32.
template <typename T>
CLORA_INLINE void read_chunk(const typename T::Storage* from, float* to) {
  for (int64_t i = 0; i < kWidth; ++i) to[i] = T::from(from[i]);
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

// sums [M][K] += dy [M][N] · weight [N, K] for columns begin .. end of K, four rows of the weight at a time, each read
// once and in the order of memory; weight has contiguous rows.
template <typename T, int64_t kM>
CLORA_INLINE void product_columns(const float* dy, const Matrix<T>& weight, int64_t begin, int64_t end, float* sums) {
  constexpr int64_t kStep = 4;
  const int64_t N = weight.rows, K = weight.columns, whole = begin + (end - begin) / kWidth * kWidth;
  for (int64_t n = 0; n < N; n += kStep) {
    const int64_t count = std::min(kStep, N - n);
    const typename T::Storage* rows[kStep];
    float factors[kM][kStep];
    for (int64_t i = 0; i < kStep; ++i) {  // beyond the last row, that one counts 0
      rows[i] = weight.data + std::min(n + i, N - 1) * weight.row_stride;
      for (int64_t m = 0; m < kM; ++m) factors[m][i] = i < count ? dy[m * N + n + i] : 0.0f;
    }
    for (int64_t k = begin; k < whole; k += kWidth) {
      alignas(64) float chunk[kStep][kWidth];
      for (int64_t i = 0; i < kStep; ++i) read_chunk<T>(rows[i] + k, chunk[i]);
      for (int64_t m = 0; m < kM; ++m) {
        Vector low = at(sums + m * K + k), high = at(sums + m * K + k + kLanes);
        for (int64_t i = 0; i < kStep; ++i) {
          low += factors[m][i] * at(chunk[i]);
          high += factors[m][i] * at(chunk[i] + kLanes);
        }
        at(sums + m * K + k) = low;
        at(sums + m * K + k + kLanes) = high;
      }
    }
    for (int64_t m = 0; m < kM; ++m) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = whole; k < end; ++k) sums[m * K + k] += factors[m][i] * T::from(rows[i][k]);
      }
    }
  }
}

#define CLORA_KERNELS(Type)                                                                                 \
  CLORA_CLONES void run(const Matrix<Type>& big, const Mask& mask, const Shrink& s, int64_t b, int64_t e) { \
    shrink_rows(big, mask, s, b, e);                                                                        \
  }                                                                                                         \
  CLORA_CLONES void run(const Matrix<Type>& big, const Mask& mask, const Reduce& s, int64_t b, int64_t e) { \
    reduce_columns(big, mask, s, b, e);                                                                     \
  }                                                                                                         \
  CLORA_CLONES void run(const Matrix<Type>& y, const Mask& mask, const Expand& s, int64_t b, int64_t e) {   \
    expand_rows(y, mask, s, b, e);                                                                          \
  }                                                                                                         \
  CLORA_CLONES void widen(const Matrix<Type>& m, const Mask& mask, int64_t padded, float* out) {            \
    widen_rows(m, mask, padded, out);                                                                       \
  }                                                                                                         \
  CLORA_CLONES void dot(const float* a, const Matrix<Type>& small, int64_t M, float* out) {                 \
    dot_rows(a, small, M, out);                                                                             \
  }                                                                                                         \
  CLORA_CLONES void transpose(const Matrix<Float32>& small, float scale, Type::Storage* out, Type) {        \
    transpose_rows<Type>(small, scale, out);                                                                \
  }                                                                                                         \
  CLORA_CLONES void product(const float* dy, const Matrix<Type>& weight, int64_t M, int64_t b, int64_t e,   \
                            float* sums) {                                                                  \
    switch (M) {                                                                                            \
      case 1: return product_columns<Type, 1>(dy, weight, b, e, sums);                                      \
      case 2: return product_columns<Type, 2>(dy, weight, b, e, sums);                                      \
      case 3: return product_columns<Type, 3>(dy, weight, b, e, sums);                                      \
      case 4: return product_columns<Type, 4>(dy, weight, b, e, sums);                                      \
      case 5: return product_columns<Type, 5>(dy, weight, b, e, sums);                                      \
      case 6: return product_columns<Type, 6>(dy, weight, b, e, sums);                                      \
      case 7: return product_columns<Type, 7>(dy, weight, b, e, sums);                                      \
      default: return product_columns<Type, 8>(dy, weight, b, e, sums);                                     \
    }                                                                                                       \
  }                                                                                                         \
  CLORA_CLONES void round(const float* from, float factor, int64_t count, Type::Storage* out, Type) {       \
    for (int64_t i = 0; i < count; ++i) out[i] = Type::to(factor * from[i]);                                \
  }

CLORA_KERNELS(Float32)
CLORA_KERNELS(BFloat16)
#ifdef CLORA_HAS_FLOAT16
CLORA_KERNELS(Float16)
#endif

template <typename T>
Matrix<T> matrix(const Tensor& t) {
  return {static_cast<typename T::Storage*>(t.data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// Calls `body` with the element type of `dtype`.
template <typename Body>
void with_type(const Tensor& t, const char* name, Body body) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return body(Float32{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
#ifdef CLORA_HAS_FLOAT16
    case ScalarType::Half:
      return body(Float16{});
#endif
    default:
      STD_TORCH_CHECK(false, name, " must be fp32, bf16 or fp16");
  }
}

void check_matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must have 2 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
}

Mask make_mask(const std::optional<Tensor>& seed, const std::optional<Tensor>& threshold, int64_t first_row,
               int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(seed.has_value() == threshold.has_value(), "seed and threshold must be given together");
  if (!seed.has_value()) return {};
  const MaskShape shape = check_mask_arguments(*seed, *threshold, first_row, rows, columns);
  STD_TORCH_CHECK(seed->is_cpu() && threshold->is_cpu(), "seed and threshold must be on the CPU");
  const int64_t least = *threshold->const_data_ptr<int64_t>();
  STD_TORCH_CHECK(0 <= least && least <= 65536, "threshold must be within 0..65536, got ", least);
  const auto key = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  return {true, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(least),
          shape.groups_per_row, first_row};
}

// A matrix as fp32 [rows][padded], dropped; zeros beyond its columns.
std::vector<float> widened(const Tensor& t, const char* name, int64_t padded, const Mask& mask = {}) {
  std::vector<float> out(static_cast<size_t>(t.size(0) * padded));
  with_type(t, name, [&](auto type) { widen(matrix<decltype(type)>(t), mask, padded, out.data()); });
  return out;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Units of `cost` floating-point operations each that make a thread worth its while.
int64_t grain(int64_t cost) { return std::max<int64_t>(1, kFlopsPerThread / std::max<int64_t>(cost, 1)); }

Tensor shrink(const Tensor& big, const Tensor& small, const std::optional<Tensor>& seed,
              const std::optional<Tensor>& threshold) {
  check_matrix(big, "big");
  check_matrix(small, "small");
  const int64_t M = big.size(0), K = big.size(1), r = small.size(0);
  STD_TORCH_CHECK(small.size(1) == K, "small must have the columns of big, ", K, ", got ", small.size(1));
  const Mask mask = make_mask(seed, threshold, 0, M, K);
  Tensor out = torch::stable::new_empty(big, {M, r}, ScalarType::Float);
  if (M <= kFewRows && (small.stride(1) == 1 || K <= 1)) {
    const std::vector<float> rows = widened(big, "big", K, mask);
    with_type(small, "small",
              [&](auto type) { dot(rows.data(), matrix<decltype(type)>(small), M, out.mutable_data_ptr<float>()); });
    return out;
  }
  const std::vector<float> factors = widened(small, "small", K);
  const int64_t tiles = (r + kWidth - 1) / kWidth;
  std::vector<float> packed(static_cast<size_t>(tiles * K * kWidth));
  pack_tiles(factors.data(), r, K, packed.data());
  const Shrink s{r, tiles, packed.data(), out.mutable_data_ptr<float>()};
  with_type(big, "big", [&](auto type) {
    const auto m = matrix<decltype(type)>(big);
    const int64_t blocks = (M + kRows - 1) / kRows;
    torch::stable::parallel_for(0, blocks, grain(2 * kRows * K * r), [&](int64_t begin, int64_t end) {
      run(m, mask, s, begin * kRows, std::min(end * kRows, M));
    });
  });
  return out;
}

Tensor reduce(const Tensor& small, const Tensor& big, const std::optional<Tensor>& seed,
              const std::optional<Tensor>& threshold) {
  check_matrix(big, "big");
  check_matrix(small, "small");
  const int64_t M = big.size(0), K = big.size(1), r = small.size(1);
  STD_TORCH_CHECK(small.size(0) == M, "small must have the rows of big, ", M, ", got ", small.size(0));
  const Mask mask = make_mask(seed, threshold, 0, M, K);
  Tensor out = torch::stable::new_empty(big, {r, K}, ScalarType::Float);
  const int64_t padded = round_up(r, kRows);
  const std::vector<float> factors = widened(small, "small", padded);
  const Reduce s{r, padded, factors.data(), out.mutable_data_ptr<float>()};
  with_type(big, "big", [&](auto type) {
    const auto m = matrix<decltype(type)>(big);
    const int64_t blocks = (K + kReduceColumns - 1) / kReduceColumns;
    torch::stable::parallel_for(0, blocks, grain(2 * M * kReduceColumns * r),
                                [&](int64_t begin, int64_t end) { run(m, mask, s, begin, end); });
  });
  return out;
}

void expand_(Tensor y, const Tensor& small, const Tensor& C, const std::optional<Tensor>& seed,
             const std::optional<Tensor>& threshold, int64_t first_row, bool accumulate) {
  check_matrix(y, "y");
  check_matrix(small, "small");
  check_matrix(C, "C");
  const int64_t M = y.size(0), N = y.size(1), r = small.size(1);
  STD_TORCH_CHECK(small.size(0) == M, "small must have the rows of y, ", M, ", got ", small.size(0));
  STD_TORCH_CHECK(C.size(0) == r && C.size(1) == N, "C must be ", r, " by ", N, ", got ", C.size(0), " by ", C.size(1));
  STD_TORCH_CHECK(N <= 1 || y.stride(1) == 1, "y must have contiguous rows");
  const Mask mask = make_mask(seed, threshold, first_row, M, N);
  const int64_t padded = round_up(N, kWidth);
  const std::vector<float> factors = widened(small, "small", r), widened_C = widened(C, "C", padded);
  const Expand s{r, padded, factors.data(), widened_C.data(), accumulate};
  with_type(y, "y", [&](auto type) {
    const auto m = matrix<decltype(type)>(y);
    const int64_t blocks = (M + kRows - 1) / kRows;
    torch::stable::parallel_for(0, blocks, grain(2 * kRows * N * r), [&](int64_t begin, int64_t end) {
      run(m, mask, s, begin * kRows, std::min(end * kRows, M));
    });
  });
}

// s · small [N, r]ᵀ as [r, N] in the dtype of `like`.
Tensor fold(const Tensor& small, const Tensor& scale, const Tensor& like) {
  check_matrix(small, "small");
  STD_TORCH_CHECK(small.stride(1) == 1 || small.size(1) <= 1, "small must have contiguous rows");
  STD_TORCH_CHECK(scale.dim() == 0 && scale.scalar_type() == ScalarType::Float && scale.is_cpu(),
                  "scale must be a 0-dim fp32 tensor on the CPU");
  STD_TORCH_CHECK(small.scalar_type() == ScalarType::Float, "small must be fp32");
  Tensor out = torch::stable::new_empty(like, {small.size(1), small.size(0)});
  with_type(out, "like", [&](auto type) {
    using T = decltype(type);
    transpose(matrix<Float32>(small), *scale.const_data_ptr<float>(),
              static_cast<typename T::Storage*>(out.mutable_data_ptr()), type);
  });
  return out;
}

// factor · t [rows, columns], contiguous fp32, in the dtype of `like`.
Tensor rounded(const Tensor& t, float factor, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {t.size(0), t.size(1)});
  with_type(out, "like", [&](auto type) {
    using T = decltype(type);
    round(t.const_data_ptr<float>(), factor, t.size(0) * t.size(1),
          static_cast<typename T::Storage*>(out.mutable_data_ptr()), type);
  });
  return out;
}

// What a kept element counts, 1/(1 - threshold/65536); 0 where all drops, 1 without dropout.
float kept_value(const std::optional<Tensor>& threshold) {
  if (!threshold.has_value()) return 1.0f;
  const int64_t least = *threshold->const_data_ptr<int64_t>();
  return least < 65536 ? 65536.0f / static_cast<float>(65536 - least) : 0.0f;
}

void check_adapter(const Tensor& t, const char* name) {
  check_matrix(t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), name, " must be fp32 and contiguous");
}

// The whole low-rank side of a plain LoRA in one call: q = drop(x)·A [M, r] and y = q·C [M, N], both rounded once.
std::tuple<Tensor, Tensor> lay_down(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
                                    const std::optional<Tensor>& seed, const std::optional<Tensor>& threshold) {
  check_adapter(lora_A, "lora_A");
  check_adapter(lora_B, "lora_B");
  const Tensor p = shrink(x, rounded(lora_A, 1.0f, x), seed, threshold);
  Tensor q = rounded(p, kept_value(threshold), x);
  Tensor y = torch::stable::new_empty(x, {x.size(0), lora_B.size(0)});
  expand_(y, q, fold(lora_B, scale, x), std::nullopt, std::nullopt, 0, false);
  return {y, q};
}

// Its backward: mask ⊙ (g·Aᵀ), which is dx but for dy·Wᵀ, dA = gᵀ·drop(x) and dB = s·(qᵀ·dy)ᵀ, in fp32; where one is
// not wanted, an empty tensor. x is read for dA, q for dB.
std::tuple<Tensor, Tensor, Tensor> lay_down_backward(const Tensor& dy, const Tensor& x, const Tensor& q,
                                                     const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
                                                     const std::optional<Tensor>& seed,
                                                     const std::optional<Tensor>& threshold, bool need_x, bool need_A,
                                                     bool need_B) {
  check_adapter(lora_A, "lora_A");
  check_adapter(lora_B, "lora_B");
  Tensor dx = torch::stable::new_empty(dy, {need_x ? dy.size(0) : 0, lora_A.size(1)});
  Tensor dA = torch::stable::new_empty(lora_A, {0}), dB = torch::stable::new_empty(lora_B, {0});
  if (need_x || need_A) {
    const Tensor h = shrink(dy, fold(lora_B, scale, dy), std::nullopt, std::nullopt);
    const Tensor g = rounded(h, kept_value(threshold), dy);
    if (need_x) expand_(dx, g, rounded(lora_A, 1.0f, dy), seed, threshold, 0, false);
    if (need_A) dA = reduce(g, x, seed, threshold);
  }
  if (need_B) dB = fold(reduce(q, dy, std::nullopt, std::nullopt), scale, lora_B);
  return {dx, dA, dB};
}

// dy [M, N] · weight [N, K] + dx, rounded once, for M <= kFewRows: fp32 sums, the weight read once in memory's order.
Tensor few_rows(const Tensor& dy, const Tensor& weight, const Tensor& dx) {
  const int64_t M = dy.size(0), K = weight.size(1);
  std::vector<float> factors = widened(dy, "dy", dy.size(1)), sums = widened(dx, "dx", K);
  with_type(weight, "weight", [&](auto type) {
    const auto m = matrix<decltype(type)>(weight);
    const int64_t blocks = (K + kBlockColumns - 1) / kBlockColumns;
    torch::stable::parallel_for(0, blocks, grain(2 * M * m.rows * kBlockColumns), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        product(factors.data(), m, M, b * kBlockColumns, std::min((b + 1) * kBlockColumns, K), sums.data());
      }
    });
  });
  Tensor out = torch::stable::new_empty(dx, {M, K});
  with_type(out, "dx", [&](auto type) {
    using T = decltype(type);
    round(sums.data(), 1.0f, M * K, static_cast<typename T::Storage*>(out.mutable_data_ptr()), type);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clora_kernels, CPU, m) {
  m.impl("routed_lora_lay_down", TORCH_BOX(&lay_down));
  m.impl("routed_lora_lay_down_backward", TORCH_BOX(&lay_down_backward));
  m.impl("routed_lora_few_rows", TORCH_BOX(&few_rows));
  m.impl("routed_lora_fold", TORCH_BOX(&fold));
  m.impl("routed_lora_shrink", TORCH_BOX(&shrink));
  m.impl("routed_lora_reduce", TORCH_BOX(&reduce));
  m.impl("routed_lora_expand_", TORCH_BOX(&expand_));
}

}  // namespace clora_kernels
