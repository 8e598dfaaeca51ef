// How the CPU kernels are vectorised: one binary for every x86-64, short vectors the compiler lowers to what there is.
#pragma once

#include <cstdint>
#include <cstring>

// The loader picks the widest instructions the processor has. A clone cannot be a template: kernels are templates that
// are always inlined into clones of plain functions.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLORA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__gnu_linux__)
#define CLORA_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLORA_CLONES
#endif
#define CLORA_INLINE inline __attribute__((always_inline))

namespace clora_kernels {

constexpr int64_t kLanes = 8;  // of fp32 in a vector
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

// By reference: a vector passed by value would follow the calling convention of the narrowest processor.
CLORA_INLINE const Vector& at(const float* from) { return *reinterpret_cast<const Vector*>(from); }
CLORA_INLINE Vector& at(float* to) { return *reinterpret_cast<Vector*>(to); }

// Element types in memory, converted to and from fp32; storing rounds to nearest, ties to even.
struct Float32 {
  using Storage = float;
  static CLORA_INLINE float from(float stored) { return stored; }
  static CLORA_INLINE float to(float value) { return value; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static CLORA_INLINE float from(uint16_t stored) {
    const uint32_t bits = static_cast<uint32_t>(stored) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  static CLORA_INLINE uint16_t to(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16 | 0x40u) : rounded);
  }
};

#ifdef __FLT16_MANT_DIG__
#define CLORA_HAS_FLOAT16 1
struct Float16 {
  using Storage = _Float16;
  static CLORA_INLINE float from(_Float16 stored) { return static_cast<float>(stored); }
  static CLORA_INLINE _Float16 to(float value) { return static_cast<_Float16>(value); }
};
#endif

}  // namespace clora_kernels
