// Schemas of the compiled operators. A fragment: operators written in Python live in the same namespace.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(clora_kernels, m) {
  m.def("dropout_mask(Tensor seed, Tensor threshold, SymInt first_row, SymInt rows, SymInt columns) -> Tensor");
}
