// Rank-1 experts on CUDA: the chosen rows are read where they lie.
#include "rank1_experts_cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <cub/device/device_radix_sort.cuh>
#include <optional>
#include <tuple>

#include "rank1_experts_expand.cuh"
#include "rank1_experts_order.cuh"
#include "rank1_experts_reduce.cuh"
#include "rank1_experts_shrink.cuh"

namespace clora_kernels {
namespace {

constexpr int kRowsOfGroup = 4;  // of a tile, where rows share their choices

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Device about(int32_t device) {
  Device found{};
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&found.l2_bytes, cudaDevAttrL2CacheSize, device));
  return found;
}

// Calls `body` with the number of rows of a tile.
template <typename Body>
void with_rows(int64_t length, Body body) {
  if (length == 1) {
    body(std::integral_constant<int, 1>{});
  } else {
    body(std::integral_constant<int, kRowsOfGroup>{});
  }
}

template <typename X, typename T>
void launch_shrink(const Tensor& big, const Tensor& experts, const Choices& c, const ChoicesOnDevice& choices,
                   const Tensor& out) {
  const int32_t device = big.get_device_index();
  const auto x = rows_of<const X>(big);
  const auto pool = rows_of<const T>(experts);
  const int64_t n = experts.size(1);
  constexpr int W = kWidth<T>;
  const bool vectors = n % W == 0 && is_aligned(x, big.size(0), W) && is_aligned(pool, experts.size(0), W);
  with_rows(c.length, [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    const ShrinkPlan plan(RowTiles(c.groups, c.length, R), kShrinkSlots<R>, choices, n, W, about(device));
    const bool in_chunks = plan.chunks > 1;
    const Tensor sums = in_chunks ? torch::stable::new_empty(out, {plan.chunks, plan.results}) : out;
    const cudaStream_t stream = current_stream(device);
    const auto kernel = vectors ? shrink_kernel<X, T, true, R> : shrink_kernel<X, T, false, R>;
    kernel<<<blocks_for(plan.tasks(), kWarps / plan.share), kThreads, 0, stream>>>(x, pool, choices, plan,
                                                                                   sums.mutable_data_ptr<float>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (in_chunks) {
      add_chunks_kernel<<<blocks_for(plan.results, kThreads), kThreads, 0, stream>>>(
          sums.const_data_ptr<float>(), plan.chunks, plan.results, out.mutable_data_ptr<float>());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
}

Tensor shrink(const Tensor& big, const Tensor& experts, const Tensor& indices) {
  check_for_cuda(big, "big");
  const Choices c = check_shrink(big, experts, indices);
  const ChoicesOnDevice choices = on_device(indices, c.experts);

  torch::stable::accelerator::DeviceGuard guard(big.get_device_index());
  Tensor out = torch::stable::new_empty(big, {big.size(0), c.k}, ScalarType::Float);
  if (out.numel() == 0) return out;
  with_type(big, [&](auto x) {
    with_type(experts, [&](auto t) { launch_shrink<decltype(x), decltype(t)>(big, experts, c, choices, out); });
  });
  return out;
}

template <typename T, typename Y>
void launch_expand(const Tensor& y, const Tensor& small, const Tensor& experts, const std::optional<Tensor>& base,
                   const Choices& c, const ChoicesOnDevice& choices) {
  const int32_t device = y.get_device_index();
  const auto to = rows_of<Y>(y);
  const auto pool = rows_of<const T>(experts);
  const auto from = base ? rows_of<const Y>(*base) : Rows<const Y>{nullptr, 0};
  const int64_t M = y.size(0), n = y.size(1);
  constexpr int W = kWidth<T>;
  const bool vectors =
      n % W == 0 && is_aligned(pool, experts.size(0), W) && is_aligned(to, M, W) && is_aligned(from, M, W);
  with_rows(c.length, [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    const ExpandPlan plan(RowTiles(c.groups, c.length, R), choices.k, n, W, about(device).multiprocessors);
    const auto kernel = vectors ? expand_kernel<T, Y, true, R> : expand_kernel<T, Y, false, R>;
    const unsigned shared = plan.share == 1 ? 0 : kWarps * R * W * kLanes * sizeof(float);
    kernel<<<blocks_for(plan.tasks, kWarps / plan.share), kThreads, shared, current_stream(device)>>>(
        to, small.const_data_ptr<float>(), pool, choices, from, plan);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void expand(const Tensor& y, const Tensor& small, const Tensor& experts, const Tensor& indices,
            const std::optional<Tensor>& base) {
  check_for_cuda(y, "y");
  const Choices c = check_expand(y, small, experts, indices, base ? &*base : nullptr);
  const ChoicesOnDevice choices = on_device(indices, c.experts);

  torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  if (y.numel() == 0) return;
  with_type(experts, [&](auto t) {
    with_type(y, [&](auto to) { launch_expand<decltype(t), decltype(to)>(y, small, experts, base, c, choices); });
  });
}

std::tuple<Tensor, Tensor> order(const Tensor& indices, int64_t experts) {
  check_on_cuda(indices, "indices");
  check_order(indices, experts);
  const ChoicesOnDevice choices = on_device(indices, experts);
  const int32_t device = indices.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  const int pairs = static_cast<int>(indices.numel());
  const auto numbers = [&](int64_t count) { return torch::stable::new_empty(indices, {count}, ScalarType::Int); };
  Tensor order = numbers(pairs), starts = numbers(experts + 1);
  const Tensor positions = numbers(pairs), keys = numbers(pairs), sorted = numbers(pairs);
  const cudaStream_t stream = current_stream(device);
  auto* sorted_keys = static_cast<uint32_t*>(sorted.mutable_data_ptr());
  if (pairs) {
    auto* from = static_cast<uint32_t*>(keys.mutable_data_ptr());
    auto* identity = positions.mutable_data_ptr<int32_t>();
    keys_kernel<<<blocks_for(pairs, kThreads), kThreads, 0, stream>>>(choices, pairs, from, identity);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    size_t bytes = 0;
    const auto sort = [&](void* scratch) {  // it is stable; without scratch it tells how many bytes it takes
      STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(scratch, bytes, from, sorted_keys, identity,
                                                     order.mutable_data_ptr<int32_t>(), pairs, 0, key_bits(experts),
                                                     stream));
    };
    sort(nullptr);
    const Tensor scratch =
        torch::stable::new_empty(indices, {static_cast<int64_t>(std::max<size_t>(bytes, 1))}, ScalarType::Byte);
    sort(scratch.mutable_data_ptr());
  }
  starts_kernel<<<blocks_for(experts + 1, kThreads), kThreads, 0, stream>>>(
      sorted_keys, pairs, static_cast<int>(experts), starts.mutable_data_ptr<int32_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {order, starts};
}

template <typename Y>
void launch_combine(const Tensor& out, const Tensor& partials, const Sorted& sorted, const int* starts,
                    const ReducePlan& plan, cudaStream_t stream) {
  constexpr int W = kWidth<float>;
  const auto to = rows_of<Y>(out);
  const bool vectors = plan.n % W == 0 && is_aligned(to, out.size(0), W);
  const auto kernel = vectors ? combine_kernel<Y, true> : combine_kernel<Y, false>;
  kernel<<<blocks_for(plan.chunks - 1, 1), kThreads, 0, stream>>>(
      to, partials.const_data_ptr<float>(), sorted, starts, plan);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename X, typename Y>
void launch_reduce(const Tensor& out, const Tensor& partials, const Tensor& big, const Sorted& sorted,
                   const int* starts, const ReducePlan& plan, cudaStream_t stream) {
  constexpr int W = kWidth<X>;
  const auto to = rows_of<Y>(out);
  const auto from = rows_of<const X>(big);
  const bool vectors = plan.n % W == 0 && is_aligned(from, big.size(0), W) && is_aligned(to, out.size(0), W);
  const auto kernel = vectors ? reduce_kernel<X, Y, true> : reduce_kernel<X, Y, false>;
  kernel<<<blocks_for(plan.chunks * tiles_of(plan.n, W), kWarps), kThreads, 0, stream>>>(
      to, partials.mutable_data_ptr<float>(), from, sorted, plan);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (plan.chunks > 1) launch_combine<Y>(out, partials, sorted, starts, plan, stream);
}

template <typename Word>
void launch_zero(const Tensor& out, int64_t element, const int* starts, cudaStream_t stream) {
  const int64_t experts = out.size(0), size = sizeof(Word);
  const Rows<Word> rows{static_cast<Word*>(out.mutable_data_ptr()), out.stride(0) * element / size};
  zero_kernel<<<blocks_for(experts, kWarps), kThreads, 0, stream>>>(rows, out.size(1) * element / size, starts,
                                                                    experts);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void reduce(const Tensor& out, const Tensor& small, const Tensor& big, const Tensor& indices, const Tensor& order,
            const Tensor& starts) {
  check_for_cuda(big, "big");
  const Choices c = check_reduce(out, small, big, indices, order, starts);
  const ChoicesOnDevice choices = on_device(indices, c.experts);

  const int32_t device = big.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  if (out.numel() == 0) return;
  const cudaStream_t stream = current_stream(device);
  const int* first = starts.const_data_ptr<int32_t>();
  const int64_t element = out.scalar_type() == ScalarType::Float ? 4 : 2;
  const Rows<const uint8_t> bytes{static_cast<const uint8_t*>(out.const_data_ptr()), out.stride(0) * element};
  const bool wide = out.size(1) * element % 16 == 0 && is_aligned(bytes, out.size(0), 16);
  (wide ? launch_zero<uint4> : launch_zero<uint16_t>)(out, element, first, stream);

  const ReducePlan plan(indices.numel(), c.length, out.size(1));
  if (plan.total == 0) return;
  const Tensor partials = torch::stable::new_empty(big, {plan.chunks, 2, plan.n}, ScalarType::Float);
  const Sorted sorted{choices, order.const_data_ptr<int32_t>(), small.const_data_ptr<float>(), plan.pairs, c.length};
  with_type(big, [&](auto x) {
    with_type(out, [&](auto y) {
      launch_reduce<decltype(x), decltype(y)>(out, partials, big, sorted, first, plan, stream);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clora_kernels, CUDA, m) {
  m.impl("rank1_experts_shrink", TORCH_BOX(&shrink));
  m.impl("rank1_experts_expand_", TORCH_BOX(&expand));
  m.impl("rank1_experts_order", TORCH_BOX(&order));
  m.impl("rank1_experts_reduce_", TORCH_BOX(&reduce));
}

}  // namespace clora_kernels
