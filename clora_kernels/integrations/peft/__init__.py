"""PEFT: its LoRA models accelerated in place, routed LoRA as a method of its own, adapters written as files it reads.

What belongs to the method is imported when it is asked for, since it needs peft: the first time makes it known to PEFT.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .accelerate import Acceleration, accelerate, restore
from .files import lora_config, save_pretrained

if TYPE_CHECKING:
    from .routed_lora import RoutedLoraConfig, next_task, save_as_lora, to_lora

__all__ = [
    "Acceleration",
    "RoutedLoraConfig",
    "accelerate",
    "lora_config",
    "next_task",
    "restore",
    "save_as_lora",
    "save_pretrained",
    "to_lora",
]


def __getattr__(name: str) -> Any:
    if name in ("RoutedLoraConfig", "next_task", "save_as_lora", "to_lora"):
        return getattr(import_module(".routed_lora", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
