"""Routed LoRA as a method of PEFT; importing this makes it known to PEFT, so that its adapters can be loaded."""

from .config import RoutedLoraConfig, RoutedLoraType
from .layer import RoutedLinear
from .model import RoutedLoraModel, next_task
from .stock import save_as_lora, to_lora

__all__ = [
    "RoutedLinear",
    "RoutedLoraConfig",
    "RoutedLoraModel",
    "RoutedLoraType",
    "next_task",
    "save_as_lora",
    "to_lora",
]
