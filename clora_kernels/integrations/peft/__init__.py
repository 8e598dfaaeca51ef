"""PEFT: its LoRA models accelerated in place, and adapters written as the files it reads."""

from .accelerate import Acceleration, accelerate, restore
from .files import lora_config, save_pretrained

__all__ = ["Acceleration", "accelerate", "lora_config", "restore", "save_pretrained"]
