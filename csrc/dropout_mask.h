// What the CPU and the CUDA implementation of the dropout mask share: argument checks and the numbering of groups.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>

#include "check.h"

namespace clora_kernels {

constexpr int64_t kGroup = 8;  // elements one Philox counter decides

struct MaskShape {
  int64_t rows, columns;
  int64_t groups_per_row;
  int64_t first_group;  // counter of element (0, 0) of this chunk

  int64_t groups() const { return rows * groups_per_row; }
};

inline void check_scalar(const torch::stable::Tensor& tensor, const char* name) {
  CLORA_CHECK(tensor.dim() == 0, name, " must be a 0-dim tensor, got ", tensor.dim(), " dimensions");
  CLORA_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Long, name, " must be an int64 tensor");
}

// The value of a threshold on the CPU.
inline uint32_t read_threshold(const torch::stable::Tensor& threshold) {
  const int64_t least = *threshold.const_data_ptr<int64_t>();
  CLORA_CHECK(0 <= least && least <= 65536, "threshold must be within 0..65536, got ", least);
  return static_cast<uint32_t>(least);
}

inline MaskShape check_mask_arguments(const torch::stable::Tensor& seed, const torch::stable::Tensor& threshold,
                                      int64_t first_row, int64_t rows, int64_t columns) {
  check_scalar(seed, "seed");
  check_scalar(threshold, "threshold");
  CLORA_CHECK(first_row >= 0, "first_row must not be negative, got ", first_row);
  CLORA_CHECK(rows >= 0, "rows must not be negative, got ", rows);
  CLORA_CHECK(columns >= 0, "columns must not be negative, got ", columns);
  constexpr int64_t largest = std::numeric_limits<int64_t>::max();
  const int64_t groups_per_row = columns / kGroup + (columns % kGroup != 0);
  const bool fits = first_row <= largest - rows &&
                    (groups_per_row == 0 || first_row + rows <= largest / groups_per_row);
  CLORA_CHECK(fits, "first_row ", first_row, " and rows ", rows, " of ", columns,
              " columns need counters beyond 63 bits");
  return {rows, columns, groups_per_row, first_row * groups_per_row};
}

}  // namespace clora_kernels
