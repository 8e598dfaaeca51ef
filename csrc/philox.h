// Philox-4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011), on host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CLORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CLORA_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace clora_kernels {

struct PhiloxWords {
  uint32_t word[4];
};

CLORA_HOST_DEVICE PhiloxWords philox_4x32_10(PhiloxWords c, uint32_t key_low, uint32_t key_high) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_0 = uint64_t{0xD2511F53u} * c.word[0];
    const uint64_t product_1 = uint64_t{0xCD9E8D57u} * c.word[2];
    c = {{static_cast<uint32_t>(product_1 >> 32) ^ c.word[1] ^ key_low, static_cast<uint32_t>(product_1),
          static_cast<uint32_t>(product_0 >> 32) ^ c.word[3] ^ key_high, static_cast<uint32_t>(product_0)}};
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return c;
}

// The mask's use of the generator: `index` numbers groups of eight elements, and each output word holds two 16-bit
// lanes, the low half first. Byte e of the two returned words is 1 where element e of the group is kept.
struct KeptBytes {
  uint32_t first_four, last_four;
};

CLORA_HOST_DEVICE uint32_t kept_pair(uint32_t word, uint32_t threshold) {
  return static_cast<uint32_t>((word & 0xFFFFu) >= threshold) | static_cast<uint32_t>((word >> 16) >= threshold) << 8;
}

CLORA_HOST_DEVICE KeptBytes kept_group(uint64_t index, uint32_t key_low, uint32_t key_high, uint32_t threshold) {
  const PhiloxWords w = philox_4x32_10(
      {{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0u, 0u}}, key_low, key_high);
  return {kept_pair(w.word[0], threshold) | kept_pair(w.word[1], threshold) << 16,
          kept_pair(w.word[2], threshold) | kept_pair(w.word[3], threshold) << 16};
}

}  // namespace clora_kernels
