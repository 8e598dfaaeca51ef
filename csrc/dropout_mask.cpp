// The dropout mask on the CPU.
#include "dropout_mask.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "philox.h"
#include "simd.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "mask bytes are written four at a time, lowest first");

namespace clora_kernels {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 128;               // groups made at once: 1 KiB of mask, which stays in the first cache
constexpr int64_t kGroupsPerThread = 1 << 12;  // less than this is not worth a second thread

// Plain arrays and no branch, so that the compiler turns the loop into vector code.
CLORA_CLONES void kept_block(uint64_t first_group, uint32_t key_low, uint32_t key_high, uint32_t threshold,
                             uint32_t* bytes) {
#pragma omp simd
  for (int64_t i = 0; i < kBlock; ++i) {
    const KeptBytes kept = kept_group(first_group + static_cast<uint64_t>(i), key_low, key_high, threshold);
    bytes[2 * i] = kept.first_four;
    bytes[2 * i + 1] = kept.last_four;
  }
}

void fill_groups(const MaskShape& shape, uint64_t key, uint32_t threshold, int64_t begin, int64_t end, bool* mask) {
  alignas(64) uint32_t bytes[2 * kBlock];
  for (int64_t block = begin; block < end; block += kBlock) {
    kept_block(static_cast<uint64_t>(shape.first_group + block), static_cast<uint32_t>(key),
               static_cast<uint32_t>(key >> 32), threshold, bytes);
    const char* source = reinterpret_cast<const char*>(bytes);
    const int64_t block_end = std::min(block + kBlock, end);
    for (int64_t group = block; group < block_end;) {  // a run of groups within one row
      const int64_t row = group / shape.groups_per_row, column = group % shape.groups_per_row * kGroup;
      const int64_t run = std::min(block_end - group, shape.groups_per_row - group % shape.groups_per_row);
      std::memcpy(mask + row * shape.columns + column, source,
                  static_cast<size_t>(std::min(run * kGroup, shape.columns - column)));
      source += run * kGroup;
      group += run;
    }
  }
}

Tensor dropout_mask_cpu(const Tensor& seed, const Tensor& threshold, int64_t first_row, int64_t rows,
                        int64_t columns) {
  const MaskShape shape = check_mask_arguments(seed, threshold, first_row, rows, columns);
  CLORA_CHECK(threshold.is_cpu(), "threshold must be on the device of seed, the CPU");
  const uint32_t least = read_threshold(threshold);
  Tensor mask = torch::stable::new_empty(seed, {rows, columns}, torch::headeronly::ScalarType::Bool);
  const uint64_t key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  bool* out = mask.mutable_data_ptr<bool>();
  torch::stable::parallel_for(0, shape.groups(), kGroupsPerThread, [&](int64_t begin, int64_t end) {
    fill_groups(shape, key, least, begin, end, out);
  });
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clora_kernels, CPU, m) { m.impl("dropout_mask", TORCH_BOX(&dropout_mask_cpu)); }

}  // namespace clora_kernels
