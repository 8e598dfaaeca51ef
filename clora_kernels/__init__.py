"""Fused kernels for LoRA and continual-learning LoRA in PyTorch."""

from .autograd.dropout_mask import dropout_mask
from .autograd.gram_schmidt import OrthonormalBasis, gram_schmidt, gram_schmidt_foreach, orthonormal_basis
from .autograd.rank1_experts import gather_rank1_experts, merge_rank1_experts, rank1_experts
from .autograd.routed_lora import (
    RoutedLoRA,
    merge_routed_lora,
    routed_lora_delta,
    routed_lora_linear,
    routed_lora_linear_group,
)
from .modules.inject import InjectReport, extract, freeze_base, inject, merge_all, to_lora, unmerge_all
from .modules.rank1_experts import ProductKeyScores, Rank1ExpertLinear
from .modules.routed_lora import RoutedLoRAFusedLinear, RoutedLoRALinear
from .reference.gram_schmidt import GramSchmidtResult
from .report import explain, info

__version__ = "0.1.0"
__all__ = [
    "GramSchmidtResult",
    "InjectReport",
    "OrthonormalBasis",
    "ProductKeyScores",
    "Rank1ExpertLinear",
    "RoutedLoRA",
    "RoutedLoRAFusedLinear",
    "RoutedLoRALinear",
    "dropout_mask",
    "explain",
    "extract",
    "freeze_base",
    "gather_rank1_experts",
    "gram_schmidt",
    "gram_schmidt_foreach",
    "info",
    "inject",
    "merge_all",
    "merge_rank1_experts",
    "merge_routed_lora",
    "orthonormal_basis",
    "rank1_experts",
    "routed_lora_delta",
    "routed_lora_linear",
    "routed_lora_linear_group",
    "to_lora",
    "unmerge_all",
]
