"""Fused kernels for LoRA and continual-learning LoRA in PyTorch."""

from .autograd.routed_lora import (
    RoutedLoRA,
    merge_routed_lora,
    routed_lora_delta,
    routed_lora_linear,
    routed_lora_linear_group,
)

__version__ = "0.1.0"
