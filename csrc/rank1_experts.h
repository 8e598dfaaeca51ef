// What the CPU and the CUDA implementation of rank-1 experts share: argument checks and the sizes that come of them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>

#include "check.h"

namespace clora_kernels {

// G groups of `length` rows choose k rows each of a pool: row m belongs to group m / length.
struct Choices {
  int64_t groups, k, length, experts;
};

inline bool is_number(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         type == ScalarType::Double;
}

inline void check_device(const torch::stable::Tensor& t, const char* name, const torch::stable::Tensor& like,
                         const char* like_name) {
  CLORA_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), name,
              " must be on the device of ", like_name);
}

// Rows may lie anywhere, the elements of one follow each other.
inline void check_rows(const torch::stable::Tensor& t, const char* name) {
  CLORA_CHECK(t.dim() == 2, name, " must have 2 dimensions, got ", t.dim());
  CLORA_CHECK(is_number(t.scalar_type()), name, " must be fp32, bf16, fp16 or fp64");
  CLORA_CHECK(t.size(1) <= 1 || t.size(0) == 0 || t.stride(1) == 1, name, " must have contiguous rows");
}

inline void check_rows_to_write(const torch::stable::Tensor& t, const char* name) {
  check_rows(t, name);
  CLORA_CHECK(t.size(0) <= 1 || t.size(1) == 0 || t.stride(0) >= t.size(1), name,
              " must have rows that do not overlap");
}

// fp64 comes alone; the others mix.
inline void check_mix(const torch::stable::Tensor& t, const char* name, const torch::stable::Tensor& like,
                      const char* like_name) {
  constexpr auto fp64 = torch::headeronly::ScalarType::Double;
  CLORA_CHECK((t.scalar_type() == fp64) == (like.scalar_type() == fp64), name, " and ", like_name,
              " must both be fp64, or neither");
}

inline void check_small(const torch::stable::Tensor& small, int64_t rows, int64_t k, const torch::stable::Tensor& like,
                        const char* like_name) {
  using torch::headeronly::ScalarType;
  CLORA_CHECK(small.dim() == 2, "small must have 2 dimensions, got ", small.dim());
  CLORA_CHECK(small.size(0) == rows && small.size(1) == k, "small must be ", rows, " by ", k, ", got ", small.size(0),
              " by ", small.size(1));
  const bool fp64 = like.scalar_type() == ScalarType::Double;
  CLORA_CHECK(small.scalar_type() == (fp64 ? ScalarType::Double : ScalarType::Float), "small must be ",
              fp64 ? "fp64" : "fp32", ", as sums for ", like_name, " are");
  CLORA_CHECK(small.is_contiguous(), "small must be contiguous");
  check_device(small, "small", like, like_name);
}

inline void check_indices(const torch::stable::Tensor& indices) {
  using torch::headeronly::ScalarType;
  CLORA_CHECK(indices.dim() == 2, "indices must have 2 dimensions, got ", indices.dim());
  const ScalarType type = indices.scalar_type();
  CLORA_CHECK(type == ScalarType::Int || type == ScalarType::Long, "indices must be int32 or int64");
  CLORA_CHECK(indices.is_contiguous(), "indices must be contiguous");
}

// `rows` is the operand with the rows [M, n] that choose.
inline Choices check_choices(const torch::stable::Tensor& indices, int64_t experts, const torch::stable::Tensor& rows,
                             const char* rows_name) {
  check_indices(indices);
  check_device(indices, "indices", rows, rows_name);
  const int64_t groups = indices.size(0), M = rows.size(0);
  CLORA_CHECK(groups ? M % groups == 0 : M == 0, "indices must have a row for each group of as many rows of ",
              rows_name, ", which has ", M, ", got ", groups);
  return {groups, indices.size(1), groups ? M / groups : 0, experts};
}

inline Choices check_shrink(const torch::stable::Tensor& big, const torch::stable::Tensor& experts,
                            const torch::stable::Tensor& indices) {
  check_rows(big, "big");
  check_rows(experts, "experts");
  check_mix(experts, "experts", big, "big");
  check_device(experts, "experts", big, "big");
  CLORA_CHECK(experts.size(1) == big.size(1), "experts must have the columns of big, ", big.size(1), ", got ",
              experts.size(1));
  return check_choices(indices, experts.size(0), big, "big");
}

// `base` is null where there is none.
inline Choices check_expand(const torch::stable::Tensor& y, const torch::stable::Tensor& small,
                            const torch::stable::Tensor& experts, const torch::stable::Tensor& indices,
                            const torch::stable::Tensor* base) {
  check_rows_to_write(y, "y");
  check_rows(experts, "experts");
  check_mix(experts, "experts", y, "y");
  check_device(experts, "experts", y, "y");
  CLORA_CHECK(experts.size(1) == y.size(1), "experts must have the columns of y, ", y.size(1), ", got ",
              experts.size(1));
  const Choices choices = check_choices(indices, experts.size(0), y, "y");
  check_small(small, y.size(0), choices.k, y, "y");
  if (base != nullptr) {
    check_rows(*base, "base");
    check_device(*base, "base", y, "y");
    CLORA_CHECK(base->scalar_type() == y.scalar_type(), "base must have the dtype of y");
    CLORA_CHECK(base->size(0) == y.size(0) && base->size(1) == y.size(1), "base must be ", y.size(0), " by ",
                y.size(1), ", got ", base->size(0), " by ", base->size(1));
  }
  return choices;
}

inline void check_order(const torch::stable::Tensor& indices, int64_t experts) {
  check_indices(indices);
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  CLORA_CHECK(0 <= experts && experts < most, "experts must be within 0..", most - 1, ", got ", experts);
  CLORA_CHECK(indices.numel() <= most, "indices must hold less than 2^31 choices, got ", indices.numel());
}

inline Choices check_reduce(const torch::stable::Tensor& out, const torch::stable::Tensor& small,
                            const torch::stable::Tensor& big, const torch::stable::Tensor& indices,
                            const torch::stable::Tensor& order, const torch::stable::Tensor& starts) {
  using torch::headeronly::ScalarType;
  check_rows_to_write(out, "out");
  check_rows(big, "big");
  check_mix(out, "out", big, "big");
  check_device(out, "out", big, "big");
  CLORA_CHECK(out.size(1) == big.size(1), "out must have the columns of big, ", big.size(1), ", got ", out.size(1));
  check_order(indices, out.size(0));
  const Choices choices = check_choices(indices, out.size(0), big, "big");
  check_small(small, big.size(0), choices.k, big, "big");
  const auto check_list = [&](const torch::stable::Tensor& t, const char* name, int64_t size) {
    CLORA_CHECK(t.dim() == 1 && t.size(0) == size, name, " must have ", size, " elements in 1 dimension, got ",
                t.numel(), " in ", t.dim());
    CLORA_CHECK(t.scalar_type() == ScalarType::Int, name, " must be int32");
    CLORA_CHECK(t.is_contiguous(), name, " must be contiguous");
    check_device(t, name, big, "big");
  };
  check_list(order, "order", indices.numel());
  check_list(starts, "starts", choices.experts + 1);
  return choices;
}

}  // namespace clora_kernels
