"""The named points at which steps of PEFT models are measured, most important first: at most 40 a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

FP32, BF16 = torch.float32, torch.bfloat16
RANK = 16


@dataclass(frozen=True)
class Point:
    """A step of a model (a name of ``models.MODELS``) with LoRA of rank 16 on every linear layer of its blocks.

    ``generates``: two steps of generation after ``tokens`` tokens in a static cache, the first as "forward", the second
    as "backward"; else a training step on so many samples of so many tokens. ``compiled``: whether the compiled
    contestants take part; compiling takes longer than all else. ``quick`` marks the few that stand for the others.
    """

    name: str
    model: str
    batch: int
    tokens: int
    dtype: torch.dtype
    dropout_p: float = 0.0
    generates: bool = False
    compiled: bool = False
    quick: bool = False

    def __str__(self) -> str:
        dropout = f" p {self.dropout_p:g}" if self.dropout_p else ""
        return f"{self.name}  batch {self.batch}x{self.tokens} {str(self.dtype).removeprefix('torch.')}{dropout}"


def tokens_of(point: Mapping[str, Any]) -> int:
    """How many tokens forward and backward together learn from, or generate, at a point as the results hold it."""
    return point["batch"] * (2 if point["generates"] else point["tokens"])


def _train(model: str, batch: int, tokens: int, dtype: torch.dtype, plain: str = "", drops: str = "") -> list[Point]:
    """A point without and one with dropout; ``plain`` and ``drops`` hold "compiled" or "quick" where that is so."""
    size = f"b{batch}" if model.startswith("vit") else f"b{batch}x{tokens}"
    name = f"train-{model}-{size}-{'fp32' if dtype == FP32 else 'bf16'}"
    return [
        Point(name + end, model, batch, tokens, dtype, p, False, "compiled" in marks, "quick" in marks)
        for end, p, marks in (("", 0.0, plain), ("-drop", 0.1, drops))
    ]


def _generate(model: str, batch: int, tokens: int, dtype: torch.dtype, marks: str = "") -> Point:
    name = f"generate-{model}-b{batch}-{'fp32' if dtype == FP32 else 'bf16'}"
    return Point(name, model, batch, tokens, dtype, 0.0, True, "compiled" in marks, "quick" in marks)


GPU_POINTS = (
    *_train("llama-8b", 4, 2048, BF16, plain="quick compiled", drops="quick compiled"),
    *_train("vit-b", 32, 197, BF16, plain="quick compiled", drops="quick"),
    _generate("llama-8b", 1, 1024, BF16, "quick compiled"),
    _generate("llama-8b", 16, 1024, BF16, "quick compiled"),
    *_train("vit-b", 64, 197, BF16),
    *_train("llama-8b", 1, 2048, BF16),
    *_train("llama-1b", 4, 512, BF16, plain="compiled"),
    *_train("vit-b", 32, 197, FP32),
    _generate("llama-1b", 1, 1024, BF16),
    _generate("llama-1b", 16, 1024, BF16),
    *_train("llama-1b", 1, 128, BF16),
    *_train("llama-8b", 4, 512, FP32),
    _generate("llama-8b", 64, 1024, BF16),
    _generate("llama-8b", 1, 1024, FP32),
)

# From the width at which calls are all that costs to that of ViT-B; a Llama has four times as many heads as it caches.
CPU_POINTS = (
    *_train("llama-256", 4, 32, FP32, plain="quick", drops="quick"),
    *_train("vit-2", 1, 197, FP32, plain="quick", drops="quick"),
    _generate("llama-256", 1, 64, FP32, "quick"),
    _generate("llama-256", 16, 64, FP32, "quick compiled"),
    *_train("llama-64", 1, 8, FP32),
    *_train("llama-64", 4, 32, FP32, plain="compiled"),
    *_train("llama-768", 1, 128, FP32),
    *_train("llama-768", 1, 128, BF16),
    *_train("llama-768", 1, 8, FP32),
    *_train("vit-2", 1, 197, BF16),
    Point("train-vit-b-b1-fp32", "vit-b", 1, 197, FP32),
    _generate("llama-64", 1, 64, FP32),
    _generate("llama-768", 1, 64, FP32),
    _generate("llama-768", 16, 64, FP32),
    _generate("llama-768", 1, 64, BF16),
    _generate("llama-768", 16, 64, BF16),
)
