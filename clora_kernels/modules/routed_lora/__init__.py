"""Routed LoRA as drop-in layers."""

from .fused import RoutedLoRAFusedLinear
from .layer import RoutedLoRALinear

__all__ = ["RoutedLoRAFusedLinear", "RoutedLoRALinear"]
