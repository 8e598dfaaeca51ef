"""The named points at which Gram-Schmidt is measured, most important first: at most 40 a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Point:
    """B matrices [d, r], beside bases of k columns if k; ``quick`` marks the few that stand for the others."""

    name: str
    B: int
    d: int
    r: int
    dtype: torch.dtype
    k: int = 0
    quick: bool = False

    def __str__(self) -> str:
        basis = f" k {self.k}" if self.k else ""
        return f"{self.name}  B {self.B} d {self.d} r {self.r}{basis} {str(self.dtype).removeprefix('torch.')}"


# vit: width of ViT-B; l3: widths of Llama 3, whose ffn is rounded up; all: the factors of every layer.
GPU_POINTS = (
    Point("l3-8b-r16-all", 224, 4096, 16, FP32, quick=True),
    Point("l3-8b-r16-all-bf16", 224, 4096, 16, BF16, quick=True),
    Point("l3-8b-r64-b64", 64, 4096, 64, FP32, quick=True),
    Point("l3-8b-r256-b32", 32, 4096, 256, FP32, quick=True),
    Point("vit-r4-b512", 512, 768, 4, FP32, quick=True),
    Point("vit-r8-b48", 48, 768, 8, FP32),
    Point("vit-r16-b48", 48, 768, 16, FP32),
    Point("vit-r64-b48", 48, 768, 64, FP32),
    Point("vit-r256-b48", 48, 768, 256, FP32),
    Point("l3-8b-r8-all", 224, 4096, 8, FP32),
    Point("l3-8b-r32-all", 224, 4096, 32, FP32),
    Point("l3-8b-r64-all-bf16", 224, 4096, 64, BF16),
    Point("l3-8b-r128-b32", 32, 4096, 128, FP32),
    Point("l3-8b-r256-b32-bf16", 32, 4096, 256, BF16),
    Point("l3-8b-r16-b1", 1, 4096, 16, FP32),
    Point("l3-8b-r64-b1", 1, 4096, 64, FP32),
    Point("l3-8b-r256-b1", 1, 4096, 256, FP32),
    Point("l3-8b-ffn-r16-b64", 64, 14336, 16, FP32),
    Point("l3-70b-ffn-r64-b32", 32, 16384, 64, FP32),
    Point("l3-70b-ffn-r256-b8", 8, 16384, 256, FP32),
    Point("l3-8b-r16-k48-all", 224, 4096, 16, FP32, k=48, quick=True),
    Point("l3-8b-r16-k160-b64", 64, 4096, 16, FP32, k=160),
)

CPU_POINTS = (
    Point("vit-r16-b48", 48, 768, 16, FP32, quick=True),
    Point("vit-r16-b48-bf16", 48, 768, 16, BF16, quick=True),
    Point("l3-8b-r16-b32", 32, 4096, 16, FP32, quick=True),
    Point("l3-8b-r64-b8", 8, 4096, 64, FP32, quick=True),
    Point("l3-8b-r256-b1", 1, 4096, 256, FP32, quick=True),
    Point("vit-r4-b512", 512, 768, 4, FP32),
    Point("vit-r4-b48", 48, 768, 4, FP32),
    Point("vit-r8-b48", 48, 768, 8, FP32),
    Point("vit-r8-b48-bf16", 48, 768, 8, BF16),
    Point("vit-r32-b24", 24, 768, 32, FP32),
    Point("vit-r64-b24-bf16", 24, 768, 64, BF16),
    Point("vit-r256-b4", 4, 768, 256, FP32),
    Point("l3-1b-r8-b64", 64, 2048, 8, FP32),
    Point("l3-1b-r16-b64-bf16", 64, 2048, 16, BF16),
    Point("l3-1b-r64-b16", 16, 2048, 64, FP32),
    Point("l3-8b-r8-b32", 32, 4096, 8, FP32),
    Point("l3-8b-r16-b32-bf16", 32, 4096, 16, BF16),
    Point("l3-8b-r16-all-bf16", 224, 4096, 16, BF16),
    Point("l3-8b-r32-b1", 1, 4096, 32, FP32),
    Point("l3-8b-r32-b16", 16, 4096, 32, FP32),
    Point("l3-8b-r64-b8-bf16", 8, 4096, 64, BF16),
    Point("l3-8b-r128-b4", 4, 4096, 128, FP32),
    Point("l3-8b-r256-b1-bf16", 1, 4096, 256, BF16),
    Point("l3-70b-ffn-r16-b8", 8, 16384, 16, FP32),
    Point("l3-70b-ffn-r64-b2", 2, 16384, 64, FP32),
    Point("l3-70b-ffn-r256-b1", 1, 16384, 256, FP32),
    Point("vit-r16-k48-b48", 48, 768, 16, FP32, k=48),
    Point("l3-8b-r16-k48-b16", 16, 4096, 16, FP32, k=48),
    Point("vit-r4-b1", 1, 768, 4, FP32),
    Point("vit-r16-b1", 1, 768, 16, FP32),
    Point("l3-8b-r16-b1", 1, 4096, 16, FP32),
)
