// What the CUDA operators of rank-1 experts take of what rank1_experts.h lets through, and how it becomes what the
// kernels read.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "check.h"
#include "rank1_experts.h"
#include "rank1_experts_pieces.cuh"

namespace clora_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_on_cuda(const Tensor& t, const char* name) {
  CLORA_CHECK(t.is_cuda(), name, " must be on a CUDA device");
}

// Of the operand whose device and dtype the others are checked against.
inline void check_for_cuda(const Tensor& t, const char* name) {
  check_on_cuda(t, name);
  CLORA_CHECK(t.scalar_type() != ScalarType::Double, name, " must be fp32, bf16 or fp16 on CUDA, got fp64");
}

// Experts and slots are int32 in the kernels, which step over slots by less than 2^30. Indices are not looked at, as
// the CPU does, for that would be to wait for them: what is outside the pool is read as its nearest expert.
inline ChoicesOnDevice on_device(const Tensor& indices, int64_t experts) {
  constexpr int64_t most_experts = std::numeric_limits<int32_t>::max() - 1, most_slots = int64_t{1} << 30;
  const int64_t k = indices.size(1);
  CLORA_CHECK(experts <= most_experts, "experts must be within 0..", most_experts, ", got ", experts);
  CLORA_CHECK(k <= most_slots, "indices must have at most ", most_slots, " columns, got ", k);
  CLORA_CHECK(experts > 0 || indices.numel() == 0, "indices must be within the pool of 0 experts");
  const bool wide = indices.scalar_type() == ScalarType::Long;
  return {indices.const_data_ptr(), wide, static_cast<int>(experts), static_cast<int>(k)};
}

template <typename T>
Rows<T> rows_of(const Tensor& t) {
  if constexpr (std::is_const_v<T>) {
    return {static_cast<T*>(t.const_data_ptr()), t.stride(0)};
  } else {
    return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0)};
  }
}

// Calls `body` with a zero of the element type of a checked matrix.
template <typename Body>
void with_type(const Tensor& t, Body body) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    default:
      return body(__half{});
  }
}

}  // namespace
}  // namespace clora_kernels
