// The skinny products of routed LoRA on the CPU: a big operand [M, K] against a small one of rank r, fp32 sums.
//
//   fold     out [r, N] = s · smallᵀ                           small [N, r]
//   shrink   out [M, r] = (mask ⊙ big) · smallᵀ                small [r, K]
//   reduce   out [r, K] = smallᵀ · (mask ⊙ big)                small [M, r]
//   expand_  y [M, N]   = mask ⊙ (small · C), or added to y    small [M, r], C [r, N]
//
// The big operand is read once. Every sum has one order whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "routed_lora_kernels.h"
#include "threads.h"

namespace clora_kernels {
namespace {

void check_matrix(const Tensor& t, const char* name) {
  CLORA_CHECK(t.dim() == 2, name, " must have 2 dimensions, got ", t.dim());
  CLORA_CHECK(t.is_cpu(), name, " must be on the CPU");
}

Mask make_mask(const std::optional<Tensor>& seed, const std::optional<Tensor>& threshold, int64_t first_row,
               int64_t rows, int64_t columns) {
  CLORA_CHECK(seed.has_value() == threshold.has_value(), "seed and threshold must be given together");
  if (!seed.has_value()) return {};
  const MaskShape shape = check_mask_arguments(*seed, *threshold, first_row, rows, columns);
  CLORA_CHECK(seed->is_cpu() && threshold->is_cpu(), "seed and threshold must be on the CPU");
  const uint32_t least = read_threshold(*threshold);
  const auto key = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  return {true, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), least,
          shape.groups_per_row, first_row};
}

// Scratch too comes from torch's allocator, where whoever measures memory sees it.
Tensor new_fp32(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns}, ScalarType::Float);
}

// A matrix as fp32 [rows][padded], dropped, zeros beyond its columns; the matrix itself where it is that already.
Tensor widened(const Tensor& t, const char* name, int64_t padded, const Mask& mask = {}) {
  if (t.scalar_type() == ScalarType::Float && t.is_contiguous() && padded == t.size(1) && !mask.given) return t;
  Tensor out = new_fp32(t, t.size(0), padded);
  auto* data = out.mutable_data_ptr<float>();
  if (padded > t.size(1)) std::fill(data, data + t.size(0) * padded, 0.0f);
  with_type(t, name, [&](auto type) { widen(matrix<decltype(type)>(t), mask, padded, data); });
  return out;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Tensor shrink(const Tensor& big, const Tensor& small, const std::optional<Tensor>& seed,
              const std::optional<Tensor>& threshold) {
  check_matrix(big, "big");
  check_matrix(small, "small");
  const int64_t M = big.size(0), K = big.size(1), r = small.size(0);
  CLORA_CHECK(small.size(1) == K, "small must have the columns of big, ", K, ", got ", small.size(1));
  const Mask mask = make_mask(seed, threshold, 0, M, K);
  Tensor out = new_fp32(big, M, r);
  if (M <= kFewRows && (small.stride(1) == 1 || K <= 1)) {
    const Tensor rows = widened(big, "big", K, mask);
    with_type(small, "small", [&](auto type) {
      dot(rows.const_data_ptr<float>(), matrix<decltype(type)>(small), M, out.mutable_data_ptr<float>());
    });
    return out;
  }
  const int64_t tiles = (r + kWidth - 1) / kWidth;
  Tensor packed = new_fp32(big, tiles, K * kWidth);
  auto* tiled = packed.mutable_data_ptr<float>();
  if (r % kWidth) std::fill(tiled + (tiles - 1) * K * kWidth, tiled + tiles * K * kWidth, 0.0f);
  with_type(small, "small", [&](auto type) { pack(matrix<decltype(type)>(small), tiled); });
  const Shrink s{r, tiles, tiled, out.mutable_data_ptr<float>()};
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
  CLORA_CHECK(small.size(0) == M, "small must have the rows of big, ", M, ", got ", small.size(0));
  const Mask mask = make_mask(seed, threshold, 0, M, K);
  Tensor out = new_fp32(big, r, K);
  const int64_t padded = round_up(r, kRows);
  const Tensor factors = widened(small, "small", padded);
  const Reduce s{r, padded, factors.const_data_ptr<float>(), out.mutable_data_ptr<float>()};
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
  CLORA_CHECK(small.size(0) == M, "small must have the rows of y, ", M, ", got ", small.size(0));
  CLORA_CHECK(C.size(0) == r && C.size(1) == N, "C must be ", r, " by ", N, ", got ", C.size(0), " by ", C.size(1));
  CLORA_CHECK(N <= 1 || y.stride(1) == 1, "y must have contiguous rows");
  CLORA_CHECK(M <= 1 || N == 0 || y.stride(0) >= N, "y must have rows that do not overlap");
  const Mask mask = make_mask(seed, threshold, first_row, M, N);
  const int64_t padded = round_up(N, kWidth);
  const Tensor factors = widened(small, "small", r), widened_C = widened(C, "C", padded);
  const Expand s{r, padded, factors.const_data_ptr<float>(), widened_C.const_data_ptr<float>(), accumulate};
  with_type(y, "y", [&](auto type) {
    const auto m = matrix<decltype(type)>(y);
    const int64_t blocks = (M + kRows - 1) / kRows;
    torch::stable::parallel_for(0, blocks, grain(2 * kRows * N * r), [&](int64_t begin, int64_t end) {
      run(m, mask, s, begin * kRows, std::min(end * kRows, M));
    });
  });
}

void check_scale(const Tensor& scale) {
  CLORA_CHECK(scale.dim() == 0 && scale.scalar_type() == ScalarType::Float && scale.is_cpu(),
              "scale must be a 0-dim fp32 tensor on the CPU");
}

// s · small [N, r]ᵀ as [r, N] in the dtype of `like`.
Tensor fold(const Tensor& small, const Tensor& scale, const Tensor& like) {
  check_matrix(small, "small");
  CLORA_CHECK(small.stride(1) == 1 || small.size(1) <= 1, "small must have contiguous rows");
  check_scale(scale);
  CLORA_CHECK(small.scalar_type() == ScalarType::Float, "small must be fp32");
  Tensor out = torch::stable::new_empty(like, {small.size(1), small.size(0)});
  with_type(out, "like", [&](auto type) {
    using T = decltype(type);
    transpose(matrix<Float32>(small), *scale.const_data_ptr<float>(),
              static_cast<typename T::Storage*>(out.mutable_data_ptr()), type);
  });
  return out;
}

// factor · t [rows, columns], contiguous fp32, in the dtype of `like`; t itself where that is the same.
Tensor rounded(const Tensor& t, float factor, const Tensor& like) {
  if (factor == 1.0f && like.scalar_type() == ScalarType::Float) return t;
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

void check_size(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check_matrix(t, name);
  CLORA_CHECK(t.size(0) == rows && t.size(1) == columns, name, " must be ", rows, " by ", columns, ", got ",
              t.size(0), " by ", t.size(1));
}

// lora_A [r, K] and lora_B [N, r] of one rank, in fp32 and contiguous.
void check_adapter(const Tensor& lora_A, const Tensor& lora_B) {
  check_matrix(lora_A, "lora_A");
  check_size(lora_B, "lora_B", lora_B.dim() ? lora_B.size(0) : 0, lora_A.size(0));
  const auto is_plain = [](const Tensor& t) { return t.scalar_type() == ScalarType::Float && t.is_contiguous(); };
  CLORA_CHECK(is_plain(lora_A), "lora_A must be fp32 and contiguous");
  CLORA_CHECK(is_plain(lora_B), "lora_B must be fp32 and contiguous");
}

// sums [M, K] += dy [M, N] · weight [N, K], dy and sums fp32 and contiguous, M from 1 to kFewRows; weight has contiguous
// rows.
void add_product(const Tensor& dy, const Tensor& weight, Tensor& sums) {
  const int64_t M = dy.size(0), K = weight.size(1);
  const auto* factors = dy.const_data_ptr<float>();
  auto* total = sums.mutable_data_ptr<float>();
  with_type(weight, "weight", [&](auto type) {
    const auto m = matrix<decltype(type)>(weight);
    const int64_t blocks = (K + kBlockColumns - 1) / kBlockColumns;
    torch::stable::parallel_for(0, blocks, grain(2 * M * m.rows * kBlockColumns), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        product(factors, m, M, b * kBlockColumns, std::min((b + 1) * kBlockColumns, K), total);
      }
    });
  });
}

Tensor product_of(const Tensor& dy, const Tensor& weight) {
  Tensor sums = new_fp32(dy, dy.size(0), weight.size(1));
  std::fill_n(sums.mutable_data_ptr<float>(), sums.numel(), 0.0f);
  add_product(dy, weight, sums);
  return sums;
}

// factor · aᵀ·b [rows, columns] for a [M, rows] and b [M, columns], fp32 and contiguous, M from 1 to kFewRows.
Tensor outer_product(const Tensor& a, const Tensor& b, float factor) {
  const int64_t M = a.size(0), rows = a.size(1), columns = b.size(1);
  Tensor out = new_fp32(a, rows, columns);
  torch::stable::parallel_for(0, rows, grain(2 * M * columns), [&](int64_t begin, int64_t end) {
    outer(a.const_data_ptr<float>(), b.const_data_ptr<float>(), M, rows, columns, factor, begin, end,
          out.mutable_data_ptr<float>());
  });
  return out;
}

// The whole low-rank side of a plain LoRA in one call: q = drop(x)·A [M, r] and y = q·C [M, N], both rounded once.
std::tuple<Tensor, Tensor> lay_down(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
                                    const std::optional<Tensor>& seed, const std::optional<Tensor>& threshold) {
  check_adapter(lora_A, lora_B);
  check_matrix(x, "x");
  check_size(x, "x", x.size(0), lora_A.size(1));
  const Tensor p = shrink(x, rounded(lora_A, 1.0f, x), seed, threshold);
  Tensor q = rounded(p, kept_value(threshold), x);
  Tensor y = torch::stable::new_empty(x, {x.size(0), lora_B.size(0)});
  expand_(y, q, fold(lora_B, scale, x), std::nullopt, std::nullopt, 0, false);
  return {y, q};
}

// g = dy·Cᵀ · kept [M, r], rounded once. In fp32 nothing is rounded on the way: s can wait, and lora_B is not copied.
Tensor gradient_of_p(const Tensor& dy, const Tensor& lora_B, const Tensor& scale, float kept) {
  const bool waits = dy.scalar_type() == ScalarType::Float;
  const Tensor C = waits ? torch::stable::transpose(lora_B, 0, 1) : fold(lora_B, scale, dy);
  const float factor = waits ? kept * *scale.const_data_ptr<float>() : kept;
  return rounded(shrink(dy, C, std::nullopt, std::nullopt), factor, dy);
}

// Its backward: mask ⊙ (g·Aᵀ), which is dx but for dy·Wᵀ, dA = gᵀ·drop(x) and dB = s·(qᵀ·dy)ᵀ, in fp32; where one
// is not wanted, an empty tensor. x is read for dA, q for dB.
std::tuple<Tensor, Tensor, Tensor> lay_down_backward(const Tensor& dy, const Tensor& x, const Tensor& q,
                                                     const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
                                                     const std::optional<Tensor>& seed,
                                                     const std::optional<Tensor>& threshold, bool need_x, bool need_A,
                                                     bool need_B) {
  check_adapter(lora_A, lora_B);
  check_matrix(dy, "dy");
  const int64_t M = dy.size(0), r = lora_A.size(0), K = lora_A.size(1);
  check_size(dy, "dy", M, lora_B.size(0));
  if (need_A) check_size(x, "x", M, K);
  if (need_B) check_size(q, "q", M, r);
  check_scale(scale);
  const Mask mask = make_mask(seed, threshold, 0, M, K);  // kept_value reads the threshold before a product does
  Tensor dx = torch::stable::new_empty(dy, {need_x ? M : 0, K});
  Tensor dA = torch::stable::new_empty(lora_A, {0}), dB = torch::stable::new_empty(lora_B, {0});
  if (0 < M && M <= kFewRows) {
    const Tensor rows = widened(dy, "dy", dy.size(1));
    const float s = *scale.const_data_ptr<float>();
    if (need_B) dB = outer_product(rows, widened(q, "q", r), s);
    if (need_x || need_A) {
      const Tensor g = widened(rounded(product_of(rows, rounded(lora_B, s, dy)), kept_value(threshold), dy), "g", r);
      if (need_x) dx = rounded(widened(product_of(g, rounded(lora_A, 1.0f, dy)), "dx", K, mask), 1.0f, dy);
      if (need_A) dA = outer_product(g, widened(x, "x", K, mask), 1.0f);
    }
    return {dx, dA, dB};
  }
  if (need_B) dB = fold(reduce(q, dy, std::nullopt, std::nullopt), scale, lora_B);
  if (need_x || need_A) {
    const Tensor g = gradient_of_p(dy, lora_B, scale, kept_value(threshold));
    if (need_x) expand_(dx, g, rounded(lora_A, 1.0f, dy), seed, threshold, 0, false);
    if (need_A) dA = reduce(g, x, seed, threshold);
  }
  return {dx, dA, dB};
}

// dy [M, N] · weight [N, K] + dx, rounded once, for 1 to kFewRows rows: fp32 sums, the weight read once as it lies.
Tensor few_rows(const Tensor& dy, const Tensor& weight, const Tensor& dx) {
  check_matrix(dy, "dy");
  check_matrix(weight, "weight");
  const int64_t M = dy.size(0), K = weight.size(1);
  CLORA_CHECK(0 < M && M <= kFewRows, "dy must have 1 to ", kFewRows, " rows, got ", M);
  check_size(weight, "weight", dy.size(1), K);
  CLORA_CHECK(weight.stride(1) == 1 || K <= 1, "weight must have contiguous rows");
  check_size(dx, "dx", M, K);
  Tensor sums = new_fp32(dx, M, K);
  with_type(dx, "dx", [&](auto type) {
    widen(matrix<decltype(type)>(dx), {}, K, sums.mutable_data_ptr<float>());
  });
  add_product(widened(dy, "dy", dy.size(1)), weight, sums);
  return rounded(sums, 1.0f, dx);
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
