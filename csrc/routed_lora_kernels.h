// Each inner loop of routed LoRA as a plain function of each element type, which the loader picks a clone of, and how
// tensors get there.
#pragma once

#include "routed_lora_blocks.h"
#include "routed_lora_few_rows.h"

namespace clora_kernels {
namespace {

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
  CLORA_CLONES void pack(const Matrix<Type>& small, float* packed) { pack_tiles(small, packed); }           \
  CLORA_CLONES void round(const float* from, float factor, int64_t count, Type::Storage* out, Type) {       \
    for (int64_t i = 0; i < count; ++i) out[i] = Type::to(factor * from[i]);                                \
  }

CLORA_KERNELS(Float32)
CLORA_KERNELS(BFloat16)
CLORA_KERNELS(Float16)

#undef CLORA_KERNELS

}  // namespace
}  // namespace clora_kernels
