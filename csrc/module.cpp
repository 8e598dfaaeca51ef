// The Python module `clora_kernels._C`. Importing it registers the operators; it offers nothing but how it was built.

// The copy of pybind11 that comes with torch 2.11 is not included where the stable ABI is asked for. Nothing of torch is
// in what it is used for here.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include <torch/csrc/stable/version.h>

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __VERSION__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = CLORA_VERSION;
  info["compiler"] = kCompiler;
  info["flags"] = CLORA_FLAGS;
  info["openmp"] = kOpenMP;
  info["threads"] = "torch::stable::parallel_for";
  info["torch"] = CLORA_TORCH_VERSION;
  info["torch_target"] = std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
                         std::to_string(TORCH_TARGET_VERSION >> 48 & 0xFF);
  info["cuda"] = CLORA_CUDA_ARCHS[0] != 0;
  info["cuda_archs"] = CLORA_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled CPU operators of clora_kernels and how they were built.";
  module.def("build_info", &build_info,
             "What this build was made with: versions, compiler, flags, threads, CUDA architectures.");
}
