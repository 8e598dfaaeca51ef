"""Fused kernels for LoRA and continual-learning LoRA in PyTorch."""

from .autograd.dropout_mask import dropout_mask
from .autograd.routed_lora import (
    RoutedLoRA,
    merge_routed_lora,
    routed_lora_delta,
    routed_lora_linear,
    routed_lora_linear_group,
)
from .modules.inject import InjectReport, extract, freeze_base, inject, merge_all, to_lora, unmerge_all
from .modules.routed_lora import RoutedLoRAFusedLinear, RoutedLoRALinear
from .report import explain, info

__version__ = "0.1.0"
__all__ = [
    "InjectReport",
    "RoutedLoRA",
    "RoutedLoRAFusedLinear",
    "RoutedLoRALinear",
    "dropout_mask",
    "explain",
    "extract",
    "freeze_base",
    "info",
    "inject",
    "merge_all",
    "merge_routed_lora",
    "routed_lora_delta",
    "routed_lora_linear",
    "routed_lora_linear_group",
    "to_lora",
    "unmerge_all",
]
