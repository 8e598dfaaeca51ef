// What a test hands to the kernels of rank-1 experts, and how it becomes what they read.
#pragma once

#include <memory>

#include "rank1_experts_pieces.cuh"

#define CLORA_CALL extern "C" __attribute__((visibility("default")))

namespace clora_kernels {
namespace {

struct Matrix {
  void* data;
  int64_t rows, columns, stride;
  int bytes;  // of an element: 4 for fp32, 2 for bf16 and fp16
  bool half;  // fp16
};

struct Call {
  const void* indices;
  bool wide;
  int experts, k;
  int64_t groups, length;
  int multiprocessors, l2_bytes;

  ChoicesOnDevice choices() const { return {indices, wide, experts, k}; }
};

template <typename T>
Rows<T> rows_of(const Matrix& m) {
  return {static_cast<T*>(m.data), m.stride};
}

// Calls `body` with a zero of the element type of a matrix.
template <typename Body>
void with_type(const Matrix& m, Body body) {
  if (m.bytes == 4) return body(float{});
  if (m.half) return body(__half{});
  return body(__nv_bfloat16{});
}

template <typename Body>
void with_rows(int64_t length, Body body) {
  if (length == 1) {
    body(std::integral_constant<int, 1>{});
  } else {
    body(std::integral_constant<int, 4>{});
  }
}

// Memory of its own that ends with its last number and begins as NaN.
inline std::unique_ptr<float[]> scratch(int64_t count) {
  std::unique_ptr<float[]> numbers(new float[static_cast<size_t>(count)]);
  std::fill_n(numbers.get(), count, __uint_as_float(0x7fc00000u));
  return numbers;
}

}  // namespace
}  // namespace clora_kernels

CLORA_CALL void seed(unsigned number) { gpu::random.seed(number); }
