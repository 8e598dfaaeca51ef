// Refusals of arguments: std::runtime_error, which torch raises as RuntimeError. The message is put together without
// streams: where a compiler links its libstdc++ partly into this library, printing a number through one can crash.
#pragma once

#include <stdexcept>
#include <string>

namespace clora_kernels {

inline std::string text(const char* part) { return part; }

template <typename Number>
std::string text(Number part) {
  return std::to_string(part);
}

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw std::runtime_error((std::string() + ... + text(parts)));
}

}  // namespace clora_kernels

#define CLORA_CHECK(condition, ...) \
  if (!(condition)) ::clora_kernels::refuse(__VA_ARGS__)
