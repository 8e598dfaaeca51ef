"""A plain LoRA layer on the CPU as one compiled call (``csrc/routed_lora.cpp``) and one frozen matmul each way.

Where there is little to compute, the steps between products are what a layer costs: PyTorch calls, each a few µs, more
when the weight has just gone through the caches. Everything of rank r is done in one call, which lays down q·C (of dx:
mask ⊙ (g·A)), and the frozen matmul accumulates on it; small fp32, in which nothing is rounded on the way, is as few
matmuls as there are products. Sums and roundings are those of the other backends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import extension
from ...reference.dropout_mask import kept_value
from ..dropout_mask import dropout_mask
from ..views import cast, flatten, unflatten
from . import compiled
from .algebra import Needs, Projection

# Multiply-adds of rank r up to which this is faster than ATen's matmuls on blocks. One thread of a Zen 4, forward +
# backward, µs: 544×64 rank 8 in fp32 400 and 430, in bf16 410 and 570; 64×2048 rank 16 in bf16 8000 and 8900.
LITTLE_WORK = 8 << 20
# Elements of x and y up to which fp32 is faster as matmuls, where something drops of x. One thread of a Zen 4,
# forward + backward, rank 16, in µs so and by the compiled call: 64×256×256 420 and 590, 128×768×768 4080 and 4330,
# 544×256×256 2330 and 2580, but 256×768×3072 29400 and 27000.
_MOST_ELEMENTS, _MOST_DROPPED = 1 << 19, 1 << 14
# So few rows, of so many elements of a weight, that the frozen product is a walk through it. One
# thread of a Zen 4, 2048×2048, in µs here and by ATen, forward in fp32 900 and 1000 for one row, 1590 and 2330 for two;
# backward in bf16 360 and 770 for one, 590 and 860 for four, 870 and 950 for eight, in fp32 1390 and 2400 for four,
# 1550 and 2080 for eight; ATen has no fast fp16 matmul at all.
_FEW_ROWS_FORWARD = {torch.float32: (range(1, 3), 1 << 19)}
_FEW_ROWS_BACKWARD = {
    torch.bfloat16: (range(1, 9), 0),
    torch.float32: (range(2, 9), 1 << 21),
    torch.float16: (range(1, 9), 0),
}


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


def _walks(M: int, weight: Tensor, few: dict[torch.dtype, tuple[range, int]]) -> bool:
    """Whether the frozen product of M rows is one of the kernels that read the weight once as it lies."""
    rows, least = few.get(weight.dtype, (range(0), 0))
    return M in rows and weight.stride(1) == 1 and weight.numel() >= least


def walks_in_fp32(M: int, elements: int) -> bool:
    """Whether it has a kernel, forward or backward, for so few rows of a weight of so many elements: 1×768×3072 takes
    590 µs forward where matmuls take 750, 2×2048×2048 3600 and 4600 with backward, but 4×768×768 830 and 590."""
    of_both = (_FEW_ROWS_FORWARD[torch.float32], _FEW_ROWS_BACKWARD[torch.float32])
    return any(M in rows and elements >= least for rows, least in of_both)


def _by_matmuls(dtype: torch.dtype, M: int, j: Projection) -> bool:
    """Whether the low-rank side is done by matmuls: in fp32, in which nothing is rounded on the way."""
    N, K = j.weight.shape
    return dtype == torch.float32 and M * (K + N) <= _MOST_ELEMENTS and (j.seed is None or M * K <= _MOST_DROPPED)


def _mask(j: Projection, M: int) -> Tensor | None:
    return None if j.seed is None else dropout_mask(j.seed, j.threshold, 0, M, j.weight.shape[1])


def _scale(j: Projection, scaling: float) -> float:
    """``scaling`` times the value of what dropout keeps."""
    return scaling if j.threshold is None else scaling * kept_value(int(j.threshold.item()))


def forward(x: Tensor, j: Projection) -> tuple[list[Tensor], list[Tensor]]:
    """As ``algebra.forward`` of one projection."""
    flat = flatten(x)
    M = flat.shape[0]
    walks, by_matmuls = _walks(M, j.weight, _FEW_ROWS_FORWARD), _by_matmuls(x.dtype, M, j)
    if by_matmuls:
        mask = _mask(j, M)
        q = F.linear(flat if mask is None else torch.where(mask, flat, 0.0), j.lora_A)
        if mask is not None:
            q.mul_(_scale(j, 1.0))
        if not walks:
            y = F.linear(x, j.weight, None if j.bias is None else cast(j.bias, x.dtype))
            scaling = j.scaling.item()  # as alpha; one of 0 would hide a NaN
            y.view(M, y.shape[-1]).addmm_(q if scaling else q * scaling, j.lora_B.mT, alpha=scaling or 1.0)
            return [y], [q]
        y = F.linear(q * j.scaling, j.lora_B)
    else:
        lay_down = torch.ops.clora_kernels.routed_lora_lay_down.default
        y, q = lay_down(flat, j.lora_A, j.lora_B, j.scaling, j.seed, j.threshold)
    if walks:
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
    whole = cast(dy, dtype)
    dy = flatten(whole)
    M, x_flat = dy.shape[0], None if x is None else flatten(x)
    walks = need_x and _walks(M, j.weight, _FEW_ROWS_BACKWARD)
    dx = dA = dB = dscaling = None
    if _by_matmuls(dtype, M, j) and not walks:
        dx, dA, dB = _backward_by_matmuls(whole, dy, x_flat, j, q, need_x, need)
    elif need_x or need.lora_A or need.lora_B:
        lay_down = torch.ops.clora_kernels.routed_lora_lay_down_backward.default
        wanted = (need_x, need.lora_A, need.lora_B)
        read = dy if x_flat is None else x_flat
        dx, dA, dB = lay_down(dy, read, q, j.lora_A, j.lora_B, j.scaling, j.seed, j.threshold, *wanted)
        if walks:
            dx = torch.ops.clora_kernels.routed_lora_few_rows.default(dy, j.weight, dx)
        elif need_x:
            dx.addmm_(dy, j.weight)
        dx = unflatten(dx, whole.shape[:-1]) if need_x else None
    if need.scaling:
        dscaling = (compiled.reduce(q, dy, None).mT * j.lora_B).sum()
    dweight = dy.mT @ x_flat if need.weight else None
    dbias = dy.sum(0, dtype=torch.float32).to(j.bias.dtype) if need.bias else None
    grads = [dweight, dA if need.lora_A else None, dB if need.lora_B else None, None, None, dbias, dscaling]
    return dx, [grads]


def _backward_by_matmuls(
    whole: Tensor, dy: Tensor, x: Tensor | None, j: Projection, q: Tensor, need_x: bool, need: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA and dB where they are wanted, from dy as it came and as [M, N]; dx is the only M×K that is made, but for
    the masked x."""
    dx = dA = dB = None
    scaling = j.scaling.item()
    if need.lora_B:
        dB = (dy.mT @ q).mul_(scaling)
    if need_x or need.lora_A:
        mask = _mask(j, dy.shape[0])
        g = (dy @ j.lora_B).mul_(_scale(j, scaling))
        if need_x and mask is None:
            dx = torch.matmul(whole, j.weight)
            dx.view(dy.shape[0], dx.shape[-1]).addmm_(g, j.lora_A)
        elif need_x:
            dx = unflatten((g @ j.lora_A).mul_(mask).addmm_(dy, j.weight), whole.shape[:-1])
        if need.lora_A:
            dA = g.mT @ (x if mask is None else torch.where(mask, x, 0.0))
    return dx, dA, dB
