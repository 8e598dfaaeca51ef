"""The named points at which routed LoRA is measured, most important first: at most 40 a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Point:
    """One layer and batch: x [M, K], weight [N, K], rank r. ``quick`` marks the few that stand for the others."""

    name: str
    M: int
    K: int
    N: int
    r: int
    dtype: torch.dtype
    dropout_p: float = 0.0
    bias: bool = False
    quick: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        dropout = f" p {self.dropout_p:g}" if self.dropout_p else ""
        return f"{self.name}  M {self.M} K {self.K} N {self.N} r {self.r} {dtype}{dropout}"


# l3: a linear of Llama 3; vit: of ViT-B/16 (197 tokens an image); digits: of a ViT of width 64 (17 tokens an image).
GPU_POINTS = (
    Point("l3-8b-q", 8192, 4096, 4096, 16, BF16, quick=True),
    Point("l3-8b-up", 8192, 4096, 14336, 16, BF16, quick=True),
    Point("l3-8b-k", 8192, 4096, 1024, 16, BF16, quick=True),
    Point("l3-8b-down", 8192, 14336, 4096, 16, BF16, quick=True),
    Point("l3-70b-q", 8192, 8192, 8192, 16, BF16),
    Point("l3-70b-k", 8192, 8192, 1024, 16, BF16),
    Point("l3-70b-up", 8192, 8192, 28672, 16, BF16),
    Point("l3-70b-down", 8192, 28672, 8192, 16, BF16),
    Point("l3-8b-q-drop", 8192, 4096, 4096, 16, BF16, 0.1, quick=True),
    Point("l3-8b-up-drop", 8192, 4096, 14336, 16, BF16, 0.1),
    Point("l3-8b-k-drop", 8192, 4096, 1024, 16, BF16, 0.1),
    Point("l3-8b-down-drop", 8192, 14336, 4096, 16, BF16, 0.1),
    Point("l3-8b-q-r8", 8192, 4096, 4096, 8, BF16),
    Point("l3-8b-q-r32", 8192, 4096, 4096, 32, BF16),
    Point("l3-8b-q-r64", 8192, 4096, 4096, 64, BF16, quick=True),
    Point("l3-8b-q-r128", 8192, 4096, 4096, 128, BF16),
    Point("l3-8b-q-r256", 8192, 4096, 4096, 256, BF16),
    Point("l3-8b-q-r256-drop", 8192, 4096, 4096, 256, BF16, 0.1),
    Point("l3-8b-q-m1", 1, 4096, 4096, 16, BF16, quick=True),
    Point("l3-8b-q-m7", 7, 4096, 4096, 16, BF16),
    Point("l3-8b-q-m64", 64, 4096, 4096, 16, BF16),
    Point("l3-8b-q-m333", 333, 4096, 4096, 16, BF16),
    Point("l3-8b-q-m1000", 1000, 4096, 4096, 16, BF16),
    Point("l3-8b-q-m2049", 2049, 4096, 4096, 16, BF16),
    Point("l3-8b-q-m4096", 4096, 4096, 4096, 16, BF16),
    Point("l3-8b-q-m16384", 16384, 4096, 4096, 16, BF16),
    Point("l3-8b-up-m1000", 1000, 4096, 14336, 16, BF16),
    Point("l3-70b-up-m2048", 2048, 8192, 28672, 16, BF16),
    Point("vit-q", 32 * 197, 768, 768, 8, BF16, bias=True, quick=True),
    Point("vit-q-drop", 32 * 197, 768, 768, 8, BF16, 0.1, bias=True),
    Point("vit-up", 32 * 197, 768, 3072, 16, BF16, bias=True),
    Point("vit-down", 32 * 197, 3072, 768, 16, BF16, bias=True),
    Point("vit-q-b128", 128 * 197, 768, 768, 8, BF16, bias=True),
    Point("vit-up-fp32", 32 * 197, 768, 3072, 16, FP32, bias=True),
    Point("l3-8b-q-fp32", 2048, 4096, 4096, 16, FP32),
    Point("l3-8b-q-fp32-drop", 2048, 4096, 4096, 16, FP32, 0.1),
)

CPU_POINTS = (
    Point("vit-q-bf16", 8 * 197, 768, 768, 16, BF16, bias=True, quick=True),
    Point("vit-q-fp32", 8 * 197, 768, 768, 16, FP32, bias=True, quick=True),
    Point("vit-up-bf16", 8 * 197, 768, 3072, 16, BF16, bias=True, quick=True),
    Point("vit-up-fp32", 8 * 197, 768, 3072, 16, FP32, bias=True),
    Point("vit-down-bf16", 8 * 197, 3072, 768, 16, BF16, bias=True),
    Point("vit-down-fp32", 8 * 197, 3072, 768, 16, FP32, bias=True),
    Point("vit-q-bf16-drop", 8 * 197, 768, 768, 16, BF16, 0.1, bias=True, quick=True),
    Point("vit-q-fp32-drop", 8 * 197, 768, 768, 16, FP32, 0.1, bias=True),
    Point("vit-up-bf16-drop", 8 * 197, 768, 3072, 16, BF16, 0.1, bias=True),
    Point("vit-down-fp32-drop", 8 * 197, 3072, 768, 16, FP32, 0.1, bias=True),
    Point("digits-q", 32 * 17, 64, 64, 8, FP32, bias=True, quick=True),
    Point("digits-up", 32 * 17, 64, 128, 8, FP32, bias=True),
    Point("digits-down", 32 * 17, 128, 64, 8, FP32, bias=True),
    Point("digits-q-drop", 32 * 17, 64, 64, 8, FP32, 0.1, bias=True),
    Point("digits-q-bf16", 32 * 17, 64, 64, 8, BF16, bias=True),
    Point("l3-1b-q-bf16", 1024, 2048, 2048, 16, BF16, quick=True),
    Point("l3-1b-q-fp32", 1024, 2048, 2048, 16, FP32),
    Point("l3-1b-k-bf16", 1024, 2048, 512, 16, BF16),
    Point("l3-1b-up-bf16", 1024, 2048, 8192, 16, BF16),
    Point("l3-1b-down-bf16", 1024, 8192, 2048, 16, BF16),
    Point("l3-1b-q-bf16-drop", 1024, 2048, 2048, 16, BF16, 0.1),
    Point("l3-1b-q-fp32-drop", 1024, 2048, 2048, 16, FP32, 0.1),
    Point("l3-1b-q-bf16-r4", 1024, 2048, 2048, 4, BF16),
    Point("l3-1b-q-bf16-r64", 1024, 2048, 2048, 64, BF16),
    Point("l3-1b-q-fp32-r64", 1024, 2048, 2048, 64, FP32),
    Point("l3-1b-q-bf16-m1", 1, 2048, 2048, 16, BF16),
    Point("l3-1b-q-fp32-m1", 1, 2048, 2048, 16, FP32, quick=True),
    Point("l3-1b-q-bf16-m7", 7, 2048, 2048, 16, BF16),
    Point("l3-1b-q-fp32-m64", 64, 2048, 2048, 16, FP32),
    Point("l3-1b-q-bf16-m64", 64, 2048, 2048, 16, BF16),
    Point("l3-8b-k-bf16-m333", 333, 4096, 1024, 16, BF16),
    Point("l3-8b-q-bf16-m333", 333, 4096, 4096, 16, BF16),
)
