// Rank-1 experts on the CPU: products and sums over rows of a pool that are chosen by indices, read where they lie.
//
//   shrink   out [M, k]  = big · (chosen rows)ᵀ                         of big [M, n], a pool [E, n], indices [G, k]
//   expand_  y [M, n]    = Σ_i small_i · (chosen row i), and a base     of small [M, k]
//   order                  the choices sorted by expert
//   reduce_  out [E, n]  = Σ small · (row of big) over the choices of a row
//
// Sums are fp32, fp64 for fp64. Every sum has one order whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>

#include "rank1_experts_bf16.h"
#include "rank1_experts_fp64.h"
#include "rank1_experts_kernels.h"
#include "threads.h"

namespace clora_kernels {
namespace {

constexpr int64_t kCacheBytes = 1 << 18;       // of rows that stay in the second cache beside as many of sums
constexpr int64_t kThirdCacheBytes = 1 << 25;  // of rows that stay in the third
constexpr int64_t kMostParts = 1 << 21;        // numbers of sums by choice that a thread keeps

int64_t blocks_of(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

AnyRows any_rows(const Tensor& t) { return {t.data_ptr(), t.scalar_type(), t.stride(0)}; }

template <typename Index>
void check_within(const Index* indices, int64_t count, int64_t experts) {
  using Unsigned = std::make_unsigned_t<Index>;
  Unsigned largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<Unsigned>(indices[i]));
  if (count == 0 || largest < static_cast<uint64_t>(experts)) return;
  for (int64_t i = 0; i < count; ++i) {
    CLORA_CHECK(0 <= indices[i] && indices[i] < experts, "indices must be within the pool of ", experts,
                " experts, got ", indices[i], " at position ", i);
  }
}

Indices read_indices(const Tensor& t, int64_t experts) {
  const bool wide = t.scalar_type() == ScalarType::Long;
  if (wide) {
    check_within(t.const_data_ptr<int64_t>(), t.numel(), experts);
  } else {
    check_within(t.const_data_ptr<int32_t>(), t.numel(), experts);
  }
  return {t.const_data_ptr(), wide};
}

// Whether rows and a pool are what the bf16 instructions are for.
bool in_pairs(const Choices& c, const Tensor& rows, const Tensor& pool) {
  constexpr auto bf16 = ScalarType::BFloat16;
  return rows.scalar_type() == bf16 && pool.scalar_type() == bf16 && c.length >= kLeastRun && c.k <= kChain &&
         has_bf16();
}

bool all_ordinary(const Tensor& rows) {
  const auto m = matrix<BFloat16>(rows);
  std::atomic<bool> ordinary{true};
  torch::stable::parallel_for(0, m.rows, grain(m.columns), [&](int64_t begin, int64_t end) {
    if (!clora_kernels::all_ordinary(m, begin, end)) ordinary = false;
  });
  return ordinary;
}

Tensor shrink(const Tensor& big, const Tensor& experts, const Tensor& indices) {
  const Choices c = check_shrink(big, experts, indices);
  const Indices chosen = read_indices(indices, c.experts);
  const int64_t M = big.size(0), n = big.size(1);
  const bool fp64 = big.scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::new_empty(big, {M, c.k}, fp64 ? ScalarType::Double : ScalarType::Float);
  if (n == 0) std::fill_n(static_cast<char*>(out.mutable_data_ptr()), out.numel() * out.element_size(), char{0});
  if (fp64) {
    torch::stable::parallel_for(0, M, grain(2 * c.k * n), [&](int64_t begin, int64_t end) {
      shrink_fp64(c, chosen, doubles(big), doubles(experts), n, begin, end, out.mutable_data_ptr<double>());
    });
    return out;
  }
  const Shrink s{c, chosen, any_rows(big), out.mutable_data_ptr<float>()};
  if (in_pairs(c, big, experts) && chosen_ordinary(matrix<BFloat16>(experts), c, chosen) && all_ordinary(big)) {
    const auto pool = matrix<BFloat16>(experts);
    torch::stable::parallel_for(0, M, grain(2 * c.k * n),
                                [&](int64_t begin, int64_t end) { shrink_pairs(pool, s, begin, end); });
    return out;
  }
  with_type(experts, "experts", [&](auto type) {
    const auto pool = matrix<decltype(type)>(experts);
    torch::stable::parallel_for(0, M, grain(2 * c.k * n),
                                [&](int64_t begin, int64_t end) { run(pool, s, begin, end); });
  });
  return out;
}

void expand_(Tensor y, const Tensor& small, const Tensor& experts, const Tensor& indices,
             const std::optional<Tensor>& base) {
  const Choices c = check_expand(y, small, experts, indices, base.has_value() ? &*base : nullptr);
  const Indices chosen = read_indices(indices, c.experts);
  const int64_t M = y.size(0), n = y.size(1);
  if (y.scalar_type() == ScalarType::Double) {
    const Doubles none{};
    return torch::stable::parallel_for(0, M, grain(2 * c.k * n), [&](int64_t begin, int64_t end) {
      expand_fp64(c, chosen, small.const_data_ptr<double>(), doubles(experts), base.has_value() ? doubles(*base) : none,
                  doubles(y), n, begin, end);
    });
  }
  AnyRows under{};
  if (base.has_value()) under = any_rows(*base);
  const Expand s{c, chosen, small.const_data_ptr<float>(), base.has_value() ? &under : nullptr, any_rows(y)};
  if (in_pairs(c, y, experts) && clora_kernels::all_ordinary(s.small, small.numel()) &&
      chosen_ordinary(matrix<BFloat16>(experts), c, chosen)) {
    const auto pool = matrix<BFloat16>(experts);
    return torch::stable::parallel_for(0, M, grain(2 * c.k * n),
                                       [&](int64_t begin, int64_t end) { expand_pairs(pool, s, begin, end); });
  }
  with_type(experts, "experts", [&](auto type) {
    const auto pool = matrix<decltype(type)>(experts);
    torch::stable::parallel_for(0, M, grain(2 * c.k * n),
                                [&](int64_t begin, int64_t end) { run(pool, s, begin, end); });
  });
}

template <typename Index>
void sort_by_expert(const Index* indices, int64_t count, int64_t experts, int32_t* order, int32_t* starts) {
  std::fill_n(starts, experts + 1, 0);
  // starts[e + 1] counts, then is where the next choice of e goes, and so ends as the end of e
  for (int64_t i = 0; i < count; ++i) ++starts[indices[i] + 1];
  int32_t sum = 0;
  for (int64_t e = 1; e <= experts; ++e) {
    const int32_t chosen = starts[e];
    starts[e] = sum;
    sum += chosen;
  }
  for (int64_t i = 0; i < count; ++i) order[starts[indices[i] + 1]++] = static_cast<int32_t>(i);
}

std::tuple<Tensor, Tensor> order(const Tensor& indices, int64_t experts) {
  check_order(indices, experts);
  const Indices chosen = read_indices(indices, experts);
  Tensor by_expert = torch::stable::new_empty(indices, {indices.numel()}, ScalarType::Int);
  Tensor starts = torch::stable::new_empty(indices, {experts + 1}, ScalarType::Int);
  auto *order = by_expert.mutable_data_ptr<int32_t>(), *first = starts.mutable_data_ptr<int32_t>();
  if (chosen.wide) {
    sort_by_expert(static_cast<const int64_t*>(chosen.data), indices.numel(), experts, order, first);
  } else {
    sort_by_expert(static_cast<const int32_t*>(chosen.data), indices.numel(), experts, order, first);
  }
  return {by_expert, starts};
}

// That order and starts lead nowhere outside; the most choices that an expert has.
int64_t check_lists(const int32_t* order, int64_t choices, const int32_t* starts, int64_t experts) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < choices; ++i) largest = std::max(largest, static_cast<uint32_t>(order[i]));
  CLORA_CHECK(choices == 0 || largest < choices, "order must hold positions of ", choices, " choices, got ",
              static_cast<int32_t>(largest));
  int64_t most = 0, least = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t chosen = int64_t{starts[e + 1]} - starts[e];
    most = std::max(most, chosen);
    least = std::min(least, chosen);
  }
  CLORA_CHECK(starts[0] == 0 && starts[experts] == choices && least >= 0,
              "starts must rise from 0 to the number of choices, ", choices);
  return most;
}

// The first expert from which on no more than `cost` lies before it: choices with their rows, and a row to write each.
int64_t expert_at(int64_t cost, const Choices& c, const int32_t* starts) {
  int64_t low = 0, high = c.experts;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] * c.length + middle < cost) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Rows in a block that serves all experts before the next one does, or 0 where that gains nothing: where all rows stay
// in the third cache, where the sums of all experts do not stay in the second, or where an expert has few choices in a
// block. No more than 64 blocks, so that the sum over them is a short one.
int64_t rows_of_a_block(const Choices& c, int64_t n, int64_t size) {
  if (c.length != 1 || c.groups * n * size <= kThirdCacheBytes) return 0;
  const int64_t sums = c.experts * kReduceColumns * static_cast<int64_t>(sizeof(float));
  const int64_t block = std::max(kCacheBytes / (kReduceColumns * size), c.groups / 64 + 1);
  return sums <= 4 * kCacheBytes && c.groups > 4 * block && block * c.k >= 8 * c.experts ? block : 0;
}

void reduce_(Tensor out, const Tensor& small, const Tensor& big, const Tensor& indices, const Tensor& order,
             const Tensor& starts) {
  const Choices c = check_reduce(out, small, big, indices, order, starts);
  const auto *by_expert = order.const_data_ptr<int32_t>(), *first = starts.const_data_ptr<int32_t>();
  const int64_t most = check_lists(by_expert, indices.numel(), first, c.experts) * c.length;
  const int64_t n = out.size(1), rows = indices.numel() * c.length, cost = rows + c.experts;
  if (out.scalar_type() == ScalarType::Double) {
    return torch::stable::parallel_for(0, blocks_of(n, kBlock), grain(2 * cost * kBlock), [&](int64_t b, int64_t end) {
      for (; b < end; ++b) {
        reduce_fp64(c, by_expert, first, small.const_data_ptr<double>(), doubles(big), doubles(out), b * kBlock,
                    std::min(kBlock, n - b * kBlock));
      }
    });
  }
  const Reduce s{c, by_expert, first, small.const_data_ptr<float>(), any_rows(out)};
  const int64_t width = kReduceColumns, parts = indices.numel() * width;
  const bool by_group = c.length >= kLeastRun && c.k >= kTile && parts <= kMostParts;
  const bool pairs = by_group && in_pairs(c, big, out) && clora_kernels::all_ordinary(s.small, small.numel()) &&
                     all_ordinary(big);
  const int64_t block = rows_of_a_block(c, n, static_cast<int64_t>(big.element_size()));
  with_type(big, "big", [&](auto type) {
    const auto m = matrix<decltype(type)>(big);
    if (!by_group && block == 0 && most <= cost / 16) {
      return torch::stable::parallel_for(0, cost, grain(2 * n), [&](int64_t begin, int64_t end) {
        run(m, s, expert_at(begin, c, first), expert_at(end, c, first), 0, n);
      });
    }
    torch::stable::parallel_for(0, blocks_of(n, width), grain(2 * cost * width), [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(static_cast<size_t>(by_group ? parts : block ? c.experts * width : 0));
      std::vector<int32_t> at(static_cast<size_t>(block ? c.experts : 0));
      for (int64_t left = begin * width; left < std::min(end * width, n); left += width) {
        const int64_t right = std::min(left + width, n);
        if (by_group) {
          if (pairs) {
            reduce_groups_pairs(matrix<BFloat16>(big), s, left, right, scratch.data());
          } else {
            run_groups(m, s, left, right, scratch.data());
          }
          const Choices alone{c.groups * c.k, 1, 1, c.experts};
          const AnyRows there = s.out.from_column(left);
          run(Matrix<Float32>{scratch.data(), parts / width, width, width, 1},
              Reduce{alone, by_expert, first, nullptr, there}, 0, c.experts, 0, right - left);
        } else if (block) {
          run_blocks(m, s, block, left, right, scratch.data(), at.data());
        } else {
          run(m, s, 0, c.experts, left, right);
        }
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clora_kernels, CPU, m) {
  m.impl("rank1_experts_shrink", TORCH_BOX(&shrink));
  m.impl("rank1_experts_expand_", TORCH_BOX(&expand_));
  m.impl("rank1_experts_order", TORCH_BOX(&order));
  m.impl("rank1_experts_reduce_", TORCH_BOX(&reduce_));
}

}  // namespace clora_kernels
