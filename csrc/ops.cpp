// Schemas of the compiled operators. A fragment: operators written in Python live in the same namespace.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(clora_kernels, m) {
  m.def("dropout_mask(Tensor seed, Tensor threshold, SymInt first_row, SymInt rows, SymInt columns) -> Tensor");
  m.def(
      "gram_schmidt_gradients(Tensor[] dQ, Tensor[] dR, Tensor[] V, Tensor[] P, Tensor[] Q, Tensor[] R, bool need_V, "
      "bool need_P) -> Tensor[]");
  m.def("gram_schmidt_sweeps(Tensor[] V, Tensor[] P, float rank_tol) -> Tensor[]");
  m.def("rank1_experts_shrink(Tensor big, Tensor experts, Tensor indices) -> Tensor");
  m.def(
      "rank1_experts_expand_(Tensor(a!) y, Tensor small, Tensor experts, Tensor indices, Tensor? base) -> ()");
  m.def("rank1_experts_order(Tensor indices, SymInt experts) -> (Tensor, Tensor)");
  m.def(
      "rank1_experts_reduce_(Tensor(a!) out, Tensor small, Tensor big, Tensor indices, Tensor order, Tensor starts) -> "
      "()");
  m.def("routed_lora_few_rows(Tensor dy, Tensor weight, Tensor dx) -> Tensor");
  m.def("routed_lora_fold(Tensor small, Tensor scale, Tensor like) -> Tensor");
  m.def("routed_lora_shrink(Tensor big, Tensor small, Tensor? seed, Tensor? threshold) -> Tensor");
  m.def("routed_lora_reduce(Tensor small, Tensor big, Tensor? seed, Tensor? threshold) -> Tensor");
  m.def(
      "routed_lora_expand_(Tensor(a!) y, Tensor small, Tensor C, Tensor? seed, Tensor? threshold, SymInt first_row, "
      "bool accumulate) -> ()");
  m.def(
      "routed_lora_lay_down(Tensor x, Tensor lora_A, Tensor lora_B, Tensor scale, Tensor? seed, Tensor? threshold) -> "
      "(Tensor, Tensor)");
  m.def(
      "routed_lora_lay_down_backward(Tensor dy, Tensor x, Tensor q, Tensor lora_A, Tensor lora_B, Tensor scale, "
      "Tensor? seed, Tensor? threshold, bool need_x, bool need_A, bool need_B) -> (Tensor, Tensor, Tensor)");
}
