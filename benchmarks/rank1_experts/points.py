"""The named points at which rank-1 experts are measured, most important first: at most 40 a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Point:
    """M rows of width d that choose k of E experts, each by itself, or all L rows of a sample together; ``quick`` marks
    the few that stand for the others."""

    name: str
    M: int
    d: int
    E: int
    k: int
    dtype: torch.dtype
    L: int = 1
    quick: bool = False

    def __str__(self) -> str:
        by = f"M {self.M}" if self.L == 1 else f"S {self.M // self.L} L {self.L}"
        return f"{self.name}  {by} d {self.d} E {self.E} k {self.k} {str(self.dtype).removeprefix('torch.')}"


# peer: pools from which each token chooses; dac: twelve experts, eight a sample; pool: large pools, chosen by sample.
GPU_POINTS = (
    Point("peer-m32768-e65536-k16-d1024-bf16", 32768, 1024, 65536, 16, BF16, quick=True),
    Point("peer-m8192-e65536-k16-d4096-bf16", 8192, 4096, 65536, 16, BF16, quick=True),
    Point("peer-m32768-e1024-k16-d4096-bf16", 32768, 4096, 1024, 16, BF16, quick=True),
    Point("pool-s32-e4096-k8-d4096-bf16", 8192, 4096, 4096, 8, BF16, L=256, quick=True),
    Point("peer-m1-e65536-k32-d4096-bf16", 1, 4096, 65536, 32, BF16, quick=True),
    Point("peer-m16384-e1024-k16-d8192-bf16", 16384, 8192, 1024, 16, BF16),
    Point("peer-m65536-e16384-k8-d768-bf16", 65536, 768, 16384, 8, BF16),
    Point("peer-m65536-e65536-k1-d768-bf16", 65536, 768, 65536, 1, BF16),
    Point("peer-m16384-e65536-k16-d2048-fp32", 16384, 2048, 65536, 16, FP32),
    Point("peer-m8192-e16384-k8-d2048-fp32", 8192, 2048, 16384, 8, FP32),
    Point("peer-m4096-e65536-k32-d1024-bf16", 4096, 1024, 65536, 32, BF16),
    Point("peer-m1024-e65536-k16-d1024-bf16", 1024, 1024, 65536, 16, BF16),
    Point("peer-m128-e65536-k16-d1024-bf16", 128, 1024, 65536, 16, BF16),
    Point("peer-m16-e16384-k16-d2048-bf16", 16, 2048, 16384, 16, BF16),
    Point("peer-m1-e1024-k8-d1024-fp32", 1, 1024, 1024, 8, FP32),
    Point("peer-m8192-e64-k8-d4096-bf16", 8192, 4096, 64, 8, BF16),
    Point("peer-m8192-e256-k8-d4096-bf16", 8192, 4096, 256, 8, BF16),
    Point("peer-m8192-e4096-k8-d4096-bf16", 8192, 4096, 4096, 8, BF16),
    Point("dac-s32-e12-k8-d768-bf16", 6304, 768, 12, 8, BF16, L=197),
    Point("dac-s32-e12-k8-d768-fp32", 6304, 768, 12, 8, FP32, L=197),
    Point("pool-s64-e1024-k16-d4096-bf16", 32768, 4096, 1024, 16, BF16, L=512),
    Point("pool-s16-e65536-k32-d4096-bf16", 8192, 4096, 65536, 32, BF16, L=512),
    Point("pool-s256-e4096-k8-d2048-fp32", 8192, 2048, 4096, 8, FP32, L=32),
    Point("pool-s8-e1024-k1-d8192-bf16", 8192, 8192, 1024, 1, BF16, L=1024),
)

CPU_POINTS = (
    Point("peer-m2048-e1024-k8-d768-fp32", 2048, 768, 1024, 8, FP32, quick=True),
    Point("peer-m2048-e1024-k8-d768-bf16", 2048, 768, 1024, 8, BF16, quick=True),
    Point("peer-m2048-e65536-k16-d1024-fp32", 2048, 1024, 65536, 16, FP32, quick=True),
    Point("dac-s8-e12-k8-d768-fp32", 1576, 768, 12, 8, FP32, L=197, quick=True),
    Point("pool-s16-e1024-k8-d768-fp32", 2048, 768, 1024, 8, FP32, L=128, quick=True),
    Point("peer-m2048-e1024-k32-d768-fp32", 2048, 768, 1024, 32, FP32),
    Point("peer-m16384-e1024-k8-d768-fp32", 16384, 768, 1024, 8, FP32),
    Point("peer-m16384-e1024-k8-d768-bf16", 16384, 768, 1024, 8, BF16),
    Point("peer-m65536-e1024-k1-d768-fp32", 65536, 768, 1024, 1, FP32),
    Point("peer-m4096-e4096-k8-d768-fp32", 4096, 768, 4096, 8, FP32),
    Point("peer-m4096-e16384-k16-d1024-fp32", 4096, 1024, 16384, 16, FP32),
    Point("peer-m4096-e16384-k16-d1024-bf16", 4096, 1024, 16384, 16, BF16),
    Point("peer-m8192-e65536-k8-d768-bf16", 8192, 768, 65536, 8, BF16),
    Point("peer-m1024-e4096-k8-d2048-fp32", 1024, 2048, 4096, 8, FP32),
    Point("peer-m512-e1024-k16-d4096-bf16", 512, 4096, 1024, 16, BF16),
    Point("peer-m256-e1024-k8-d8192-fp32", 256, 8192, 1024, 8, FP32),
    Point("peer-m64-e1024-k16-d768-fp32", 64, 768, 1024, 16, FP32),
    Point("peer-m64-e65536-k16-d768-bf16", 64, 768, 65536, 16, BF16),
    Point("peer-m1-e65536-k32-d768-fp32", 1, 768, 65536, 32, FP32),
    Point("peer-m1-e1024-k8-d768-fp32", 1, 768, 1024, 8, FP32),
    Point("peer-m1-e12-k1-d768-fp32", 1, 768, 12, 1, FP32),
    Point("peer-m2048-e12-k8-d768-fp32", 2048, 768, 12, 8, FP32),
    Point("peer-m2048-e64-k8-d768-fp32", 2048, 768, 64, 8, FP32),
    Point("peer-m2048-e64-k8-d768-bf16", 2048, 768, 64, 8, BF16),
    Point("peer-m2048-e256-k8-d768-fp32", 2048, 768, 256, 8, FP32),
    Point("dac-s8-e12-k8-d768-bf16", 1576, 768, 12, 8, BF16, L=197),
    Point("pool-s16-e1024-k8-d768-bf16", 2048, 768, 1024, 8, BF16, L=128),
    Point("pool-s4-e65536-k32-d1024-fp32", 2048, 1024, 65536, 32, FP32, L=512),
    Point("pool-s64-e4096-k8-d2048-fp32", 2048, 2048, 4096, 8, FP32, L=32),
    Point("pool-s256-e1024-k16-d768-fp32", 2048, 768, 1024, 16, FP32, L=8),
)
