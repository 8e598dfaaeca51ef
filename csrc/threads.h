// How work is shared among threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace clora_kernels {

constexpr int64_t kFlopsPerThread = 1 << 19;  // less than this is not worth a second thread

// Units of `cost` floating-point operations each that make a thread worth its while.
inline int64_t grain(int64_t cost) { return std::max<int64_t>(1, kFlopsPerThread / std::max<int64_t>(cost, 1)); }

}  // namespace clora_kernels
