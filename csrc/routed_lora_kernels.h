// Each inner loop of routed LoRA as a plain function of each element type, which the loader picks a clone of, and how
// tensors get there.
#pragma once

#include "routed_lora_blocks.h"
#include "routed_lora_few_rows.h"

namespace clora_kernels {
namespace {

// A function for each number of rows, so that sums of all of them stay in registers.
#define CLORA_BY_ROWS(M, function, ...)               \
  switch (M) {                                        \
    case 1: return function<1>(__VA_ARGS__);          \
    case 2: return function<2>(__VA_ARGS__);          \
    case 3: return function<3>(__VA_ARGS__);          \
    case 4: return function<4>(__VA_ARGS__);          \
    case 5: return function<5>(__VA_ARGS__);          \
    case 6: return function<6>(__VA_ARGS__);          \
    case 7: return function<7>(__VA_ARGS__);          \
    default: return function<kFewRows>(__VA_ARGS__);  \
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
    CLORA_BY_ROWS(M, product_columns, dy, weight, b, e, sums)                                               \
  }                                                                                                         \
  CLORA_CLONES void pack(const Matrix<Type>& small, float* packed) { pack_tiles(small, packed); }           \
  CLORA_CLONES void round(const float* from, float factor, int64_t count, Type::Storage* out, Type) {       \
    for (int64_t i = 0; i < count; ++i) out[i] = Type::to(factor * from[i]);                                \
  }

CLORA_KERNELS(Float32)
CLORA_KERNELS(BFloat16)
CLORA_KERNELS(Float16)

CLORA_CLONES void outer(const float* a, const float* b, int64_t M, int64_t rows, int64_t columns, float factor,
                        int64_t begin, int64_t end, float* out) {
  CLORA_BY_ROWS(M, outer_rows, a, b, rows, columns, factor, begin, end, out)
}

#undef CLORA_KERNELS
#undef CLORA_BY_ROWS

}  // namespace
}  // namespace clora_kernels
