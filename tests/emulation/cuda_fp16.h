// fp16 as CUDA names it, in place of its header.
#pragma once

#include <cstring>

struct __half {
  _Float16 value;
};

inline float __half2float(__half from) { return static_cast<float>(from.value); }
inline __half __float2half_rn(float from) { return {static_cast<_Float16>(from)}; }

inline unsigned short __half_as_ushort(__half from) {
  unsigned short bits;
  std::memcpy(&bits, &from, sizeof(bits));
  return bits;
}

inline __half __ushort_as_half(unsigned short bits) {
  __half to;
  std::memcpy(&to, &bits, sizeof(to));
  return to;
}
