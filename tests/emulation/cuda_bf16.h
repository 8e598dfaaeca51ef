// bf16 as CUDA names it, in place of its header.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  unsigned short bits;
};

inline float __bfloat162float(__nv_bfloat16 from) { return __uint_as_float(static_cast<uint32_t>(from.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float from) {
  const uint32_t bits = __float_as_uint(from);
  if (from != from) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 from) { return from.bits; }
