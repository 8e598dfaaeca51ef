// The dropout mask on CUDA.
#include "dropout_mask.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "philox.h"

namespace clora_kernels {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;

// One group of eight elements a thread and step. `kWholeGroups`: columns is a multiple of eight, so a group is eight
// consecutive, aligned bytes of the mask; otherwise rows end within a group and its bytes are stored one by one.
// The threshold is read from `threshold_ptr`, or is `threshold_value` where that is null (it came from the host).
template <bool kWholeGroups>
__global__ void __launch_bounds__(kThreads)
    dropout_mask_kernel(const int64_t* __restrict__ seed_ptr, const int64_t* __restrict__ threshold_ptr,
                        int64_t threshold_value, MaskShape shape, bool* __restrict__ mask) {
  const uint64_t key = static_cast<uint64_t>(*seed_ptr);
  const uint32_t threshold = static_cast<uint32_t>(threshold_ptr ? *threshold_ptr : threshold_value);
  const int64_t groups = shape.rows * shape.groups_per_row;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; group < groups; group += step) {
    const KeptBytes kept = kept_group(static_cast<uint64_t>(shape.first_group + group), static_cast<uint32_t>(key),
                                      static_cast<uint32_t>(key >> 32), threshold);
    if constexpr (kWholeGroups) {
      reinterpret_cast<uint2*>(mask)[group] = make_uint2(kept.first_four, kept.last_four);
    } else {
      const int64_t row = group / shape.groups_per_row, column = (group - row * shape.groups_per_row) * kGroup;
      bool* to = mask + row * shape.columns + column;
      const uint64_t bytes = kept.first_four | static_cast<uint64_t>(kept.last_four) << 32;
#pragma unroll
      for (int e = 0; e < kGroup; ++e)
        if (column + e < shape.columns) to[e] = bytes >> (8 * e) & 1;
    }
  }
}

Tensor dropout_mask_cuda(const Tensor& seed, const Tensor& threshold, int64_t first_row, int64_t rows,
                         int64_t columns) {
  const MaskShape shape = check_mask_arguments(seed, threshold, first_row, rows, columns);
  const int32_t device = seed.get_device_index();
  const bool on_host = threshold.is_cpu();
  CLORA_CHECK(seed.is_cuda(), "seed must be on a CUDA device");
  CLORA_CHECK(on_host || (threshold.is_cuda() && threshold.get_device_index() == device),
              "threshold must be on the device of seed, cuda:", device, ", or on the CPU");
  const uint32_t value = on_host ? read_threshold(threshold) : 0;

  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor mask = torch::stable::new_empty(seed, {rows, columns}, torch::headeronly::ScalarType::Bool);
  if (shape.groups() == 0) return mask;
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int64_t blocks = std::min<int64_t>((shape.groups() + kThreads - 1) / kThreads,
                                           static_cast<int64_t>(multiprocessors) * kBlocksPerMultiprocessor);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto kernel = columns % kGroup == 0 ? dropout_mask_kernel<true> : dropout_mask_kernel<false>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      seed.const_data_ptr<int64_t>(), on_host ? nullptr : threshold.const_data_ptr<int64_t>(), value, shape,
      mask.mutable_data_ptr<bool>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clora_kernels, CUDA, m) { m.impl("dropout_mask", TORCH_BOX(&dropout_mask_cuda)); }

}  // namespace clora_kernels
