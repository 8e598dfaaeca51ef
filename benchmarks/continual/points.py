"""The named points at which a training step is measured, most important first: at most 40 a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP32, BF16 = torch.float32, torch.bfloat16
METHODS = ("c-lora", "cl-lora", "dac", "slao", "lora")
ON_LLAMA = tuple(method for method in METHODS if method != "cl-lora")  # it distills a class token


@dataclass(frozen=True)
class Point:
    """A method on a model (a name of ``models.MODELS``) and a batch of so many samples of so many tokens; ``quick``
    marks the few that stand for the others."""

    name: str
    method: str
    model: str
    batch: int
    tokens: int
    dtype: torch.dtype
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.name}  batch {self.batch}x{self.tokens} {str(self.dtype).removeprefix('torch.')}"


def _points(
    model: str, batch: int, tokens: int, dtype: torch.dtype, methods: tuple[str, ...], quick: tuple[str, ...] = ()
) -> tuple[Point, ...]:
    """A point for each method."""
    size = f"b{batch}" if model.startswith("vit") else f"b{batch}x{tokens}"
    name = f"{model}-{size}-{'fp32' if dtype == FP32 else 'bf16'}"
    return tuple(Point(f"{m}-{name}", m, model, batch, tokens, dtype, m in quick) for m in methods)


# vit2, vit12: so many blocks of ViT-B/16 (197 tokens an image); l1b: a block of Llama 3.2 1B; l8b: two of Llama 3 8B.
GPU_POINTS = (
    *_points("vit12", 32, 197, BF16, METHODS, quick=("c-lora", "cl-lora", "dac")),
    *_points("l8b", 4, 2048, BF16, ON_LLAMA, quick=("c-lora", "slao")),
    *_points("vit12", 64, 197, BF16, METHODS),
    *_points("l8b", 1, 2048, BF16, ON_LLAMA),
    *_points("vit12", 32, 197, FP32, METHODS),
)

CPU_POINTS = (
    *_points("vit2", 1, 197, FP32, METHODS, quick=("c-lora", "cl-lora", "dac")),
    *_points("vit2", 8, 197, FP32, METHODS),
    *_points("vit2", 8, 197, BF16, METHODS),
    *_points("l1b", 1, 128, BF16, ON_LLAMA, quick=("c-lora",)),
    *_points("l1b", 1, 512, BF16, ON_LLAMA),
    *_points("l1b", 1, 128, FP32, ON_LLAMA),
    *_points("l1b", 4, 128, FP32, ON_LLAMA),
    *_points("l1b", 4, 512, BF16, ("c-lora", "lora")),
)
