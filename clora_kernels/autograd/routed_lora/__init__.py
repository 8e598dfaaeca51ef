"""The public functions of routed LoRA."""

from .functions import RoutedLoRA, routed_lora_delta, routed_lora_linear, routed_lora_linear_group
from .merge import merge_routed_lora

__all__ = ["RoutedLoRA", "merge_routed_lora", "routed_lora_delta", "routed_lora_linear", "routed_lora_linear_group"]
