// The choices by expert: keys and positions for the sort, and where each expert begins in what it gives.
#pragma once

#include "rank1_experts_pieces.cuh"

namespace clora_kernels {
namespace {

__global__ void __launch_bounds__(kThreads)
    keys_kernel(ChoicesOnDevice choices, int pairs, uint32_t* keys, int* positions) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; p < pairs; p += step) {
    keys[p] = static_cast<uint32_t>(choices[p]);
    positions[p] = static_cast<int>(p);
  }
}

// starts[e] = how many keys are below e, for e = 0 .. experts: a search for each, as no expert that many others lie
// between without a choice may make one thread write all of them.
__global__ void __launch_bounds__(kThreads)
    starts_kernel(const uint32_t* sorted, int pairs, int experts, int* starts) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e <= experts; e += step) {
    int first = 0, last = pairs;
    while (first < last) {
      const int middle = first + (last - first) / 2;
      if (sorted[middle] < static_cast<uint32_t>(e)) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    starts[e] = first;
  }
}

// Bits in which keys below `experts` may differ.
inline int key_bits(int64_t experts) {
  int bits = 1;
  while (bits < 31 && (int64_t{1} << bits) < experts) ++bits;
  return bits;
}

}  // namespace
}  // namespace clora_kernels
