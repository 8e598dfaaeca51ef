"""A plain LoRA layer on the CPU as one compiled call (``csrc/routed_lora.cpp``) and one frozen matmul each way.

Where there is little to compute, the steps between products are what a layer costs: PyTorch calls, each a few µs, more
when the weight has just gone through the caches. Everything of rank r is done in one call, which lays down q·C (of dx:
mask ⊙ (g·A)), or by MKL where fp32 needs no mask; the frozen matmul accumulates on it. Sums and roundings are those of
the other backends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import extension
from ..views import cast, flatten, unflatten
from . import compiled
from .algebra import Needs, Projection

# Multiply-adds of rank r up to which this is faster than ATen's matmuls on blocks. One thread of a Zen 4, forward +
# backward, µs: 544×64 rank 8 in fp32 400 and 430, in bf16 410 and 570; 64×2048 rank 16 in bf16 8000 and 8900.
LITTLE_WORK = 8 << 20
# So few rows that the frozen product is a walk through the weight: one thread of a Zen 4, 2048×2048, in µs here and by
# ATen, forward in fp32 385 and 630 for one row, 1090 and 1450 for two; backward in bf16 360 and 770 for one, 590 and
# 860 for four, 870 and 950 for eight, in fp32 1390 and 2400 for four, 1550 and 2080 for eight; ATen has no fast fp16
# matmul at all.
_FEW_ROWS_FORWARD = {torch.float32: range(1, 3)}
_FEW_ROWS_BACKWARD = {torch.bfloat16: range(1, 9), torch.float32: range(2, 9), torch.float16: range(1, 9)}


def why_not(x: Tensor, projections: Sequence[Projection]) -> str:
    """Why these projections cannot be computed so; empty if they can, ``extension.CPU_MISSING`` if nothing else is in
    the way."""
    j = projections[0]
    if len(projections) > 1:
        return "it computes one projection at a time, not a group"
    if j.weight is None:
        return "it needs a weight"
    if j.routing is not None or j.gate is not None:
        given = [name for name in ("routing", "gate") if getattr(j, name) is not None]
        return f"it has no {' and no '.join(given)}"
    if not compiled.takes(x):
        return f"it is not built for {x.dtype} on {x.device.type}"
    if not (takes(j.lora_A) and takes(j.lora_B)):
        return "it takes lora_A and lora_B in fp32 and contiguous"
    if j.scaling.dtype != torch.float32 or not j.scaling.is_cpu:
        return "it takes an fp32 scaling on the CPU"
    return "" if is_built() else extension.CPU_MISSING


def is_built() -> bool:
    return extension.has_op("routed_lora_lay_down", "cpu")


def takes(t: Tensor) -> bool:
    """Whether ``t`` is a lora_A or lora_B as the compiled call reads them."""
    return t.dtype == torch.float32 and t.is_contiguous()


def has_little_work(M: int, lora_A: Tensor, lora_B: Tensor) -> bool:
    return M * lora_A.shape[0] * (lora_A.shape[1] + lora_B.shape[0]) <= LITTLE_WORK


def forward(x: Tensor, j: Projection) -> tuple[list[Tensor], list[Tensor]]:
    """As ``algebra.forward`` of one projection."""
    flat = flatten(x)
    if x.dtype == torch.float32 and j.seed is None:
        # Nothing is rounded or masked on the way, so MKL can do it: 8×2048×768, rank 16, takes 28 µs in place of 42.
        q = flat @ j.lora_A.mT
        y = (q * j.scaling) @ j.lora_B.mT
    else:
        lay_down = torch.ops.clora_kernels.routed_lora_lay_down.default
        y, q = lay_down(flat, j.lora_A, j.lora_B, j.scaling, j.seed, j.threshold)
    if flat.shape[0] in _FEW_ROWS_FORWARD.get(x.dtype, ()) and j.weight.stride(1) == 1:
        y.add_(compiled.shrink(flat, j.weight, None))
    else:
        y.addmm_(flat, j.weight.mT)
    if j.bias is not None:
        y.add_(j.bias)
    return [unflatten(y, x.shape[:-1])], [q]


def backward(
    dy: Tensor, x: Tensor | None, j: Projection, q: Tensor, need_x: bool, need: Needs, dtype: torch.dtype
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """As ``algebra.backward`` of one projection."""
    lead, dy = dy.shape[:-1], cast(flatten(dy), dtype)
    x_flat = None if x is None else flatten(x)
    dx = dA = dB = dscaling = None
    if need_x or need.lora_A or need.lora_B:
        lay_down = torch.ops.clora_kernels.routed_lora_lay_down_backward.default
        wanted = (need_x, need.lora_A, need.lora_B)
        read = dy if x_flat is None else x_flat
        dx, dA, dB = lay_down(dy, read, q, j.lora_A, j.lora_B, j.scaling, j.seed, j.threshold, *wanted)
    if need_x:
        if dy.shape[0] in _FEW_ROWS_BACKWARD[dtype] and j.weight.stride(1) == 1:
            dx = torch.ops.clora_kernels.routed_lora_few_rows.default(dy, j.weight, dx)
        else:
            dx.addmm_(dy, j.weight)
        dx = unflatten(dx, lead)
    if need.scaling:
        dscaling = (compiled.reduce(q, dy, None).mT * j.lora_B).sum()
    dweight = dy.mT @ x_flat if need.weight else None
    dbias = dy.sum(0, dtype=torch.float32).to(j.bias.dtype) if need.bias else None
    grads = [dweight, dA if need.lora_A else None, dB if need.lora_B else None, None, None, dbias, dscaling]
    return dx if need_x else None, [grads]
