// Matrices in memory of any element type and strides, and how tensors become them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "check.h"
#include "simd.h"

namespace clora_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A matrix of T in memory with any strides.
template <typename T>
struct Matrix {
  using Storage = typename T::Storage;
  Storage* data;
  int64_t rows, columns, row_stride, column_stride;
};

template <typename T>
Matrix<T> matrix(const Tensor& t) {
  return {static_cast<typename T::Storage*>(t.data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// Calls `body` with the element type of `type`.
template <typename Body>
void with_type(ScalarType type, const char* name, Body body) {
  switch (type) {
    case ScalarType::Float:
      return body(Float32{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Float16{});
    default:
      CLORA_CHECK(false, name, " must be fp32, bf16 or fp16");
  }
}

template <typename Body>
void with_type(const Tensor& t, const char* name, Body body) {
  with_type(t.scalar_type(), name, body);
}

}  // namespace clora_kernels
