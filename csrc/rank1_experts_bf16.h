// Rank-1 experts by the bf16 instructions of a CPU (AVX512-BF16), for rows that share their choices and a pool, all in
// bf16: two products and their sum in fp32 at a time. Products are exact; the small operand of a sum is rounded to bf16
// once, as the rounding contract grants. The instructions take subnormal numbers for zeros, so calls with numbers that
// are small enough for that to matter are left to the other loops.
#pragma once

#include "rank1_experts_reduce.h"

namespace clora_kernels {

constexpr float kTiny = 0x1p-60f;  // a product of two numbers that are not below is none that is taken for zero

// Whether the processor has the instructions, and CLORA_CPU_BF16=0 in the environment, read once, does not forbid them.
bool has_bf16();

// Whether no number but zero is tiny: of factors, of rows, of all rows that are chosen.
bool all_ordinary(const float* factors, int64_t count);
bool all_ordinary(const Matrix<BFloat16>& rows, int64_t begin, int64_t end);
bool chosen_ordinary(const Matrix<BFloat16>& experts, const Choices& c, const Indices& indices);

// As shrink_rows, expand_rows and reduce_groups, for kChain choices at most.
void shrink_pairs(const Matrix<BFloat16>& experts, const Shrink& s, int64_t begin, int64_t end);
void expand_pairs(const Matrix<BFloat16>& experts, const Expand& s, int64_t begin, int64_t end);
void reduce_groups_pairs(const Matrix<BFloat16>& big, const Reduce& s, int64_t left, int64_t right, float* parts);

}  // namespace clora_kernels
