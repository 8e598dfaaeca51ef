// The loops of rank-1 experts as plain functions of each element type, which the loader picks a clone of.
#pragma once

#include "rank1_experts_reduce.h"

namespace clora_kernels {
namespace {

#define CLORA_KERNELS(Type)                                                                                   \
  CLORA_CLONES void run(const Matrix<Type>& experts, const Shrink& s, int64_t b, int64_t e) {                 \
    shrink_rows(experts, s, b, e);                                                                            \
  }                                                                                                           \
  CLORA_CLONES void run(const Matrix<Type>& experts, const Expand& s, int64_t b, int64_t e) {                 \
    expand_rows(experts, s, b, e);                                                                            \
  }                                                                                                           \
  CLORA_CLONES void run(const Matrix<Type>& big, const Reduce& s, int64_t b, int64_t e, int64_t l, int64_t r) {\
    reduce_experts(big, s, b, e, l, r);                                                                       \
  }                                                                                                           \
  CLORA_CLONES void run_blocks(const Matrix<Type>& big, const Reduce& s, int64_t block, int64_t l, int64_t r, \
                               float* sums, int32_t* at) {                                                    \
    reduce_blocks(big, s, block, l, r, sums, at);                                                             \
  }                                                                                                           \
  CLORA_CLONES void run_groups(const Matrix<Type>& big, const Reduce& s, int64_t l, int64_t r, float* parts) {\
    reduce_groups(big, s, l, r, parts);                                                                       \
  }

CLORA_KERNELS(Float32)
CLORA_KERNELS(BFloat16)
CLORA_KERNELS(Float16)

#undef CLORA_KERNELS

}  // namespace
}  // namespace clora_kernels
