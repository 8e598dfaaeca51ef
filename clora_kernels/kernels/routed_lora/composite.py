"""Plain LoRA as matmuls that ATen itself differentiates, for calls so small that being called is what they cost.

A Function and its Python take longer than the products of a small layer. In the dtype of the sums nothing is rounded
on the way, so the frozen product may come first and the adapter be added onto it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout_mask import dropout_mask
from ..views import flatten, unflatten
from . import layer
from .algebra import Projection

DTYPES = (torch.float32, torch.float64)
"""Those of the sums, in which an adapter that is added later is not rounded away."""

# Elements of x and y up to which it is faster, where nothing learns: 128×768×768 takes 1830 µs on one thread of a
# Zen 4, 1960 otherwise. Where something learns ATen makes dx twice, and with dropout keeps a mask and the masked x; so
# it is for calls that are next to nothing: 8×64×64, rank 16, takes 119 µs forward + backward, 175 by a Function.
_MOST_ELEMENTS, _MOST_LEARNING = 1 << 19, 1 << 15


def why_not(x: Tensor, projections: Sequence[Projection]) -> str:
    """Why these projections cannot be computed so; empty if they can."""
    dtype = x.dtype
    if dtype not in DTYPES:
        return f"it would round an adapter of {dtype}"
    for j in projections:
        if not (j.routing is j.gate is None):
            return "it has no routing and no gate"
        if not (
            j.lora_A.dtype == j.lora_B.dtype == dtype
            and (j.bias is None or j.bias.dtype == dtype)
            and (j.base_output is None or j.base_output.dtype == dtype)
        ):
            return f"it takes adapter, bias and base_output in the dtype of x, {dtype}"
    return ""


def is_faster(M: int, K: int, N: int, learns: bool) -> bool:
    """Whether it is the fastest way on a CPU for M rows of a K×N layer."""
    most = _MOST_LEARNING if learns else _MOST_ELEMENTS
    return M * (K + N) <= most and not layer.walks_in_fp32(M, K * N)


def forward(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    base_output: Tensor | None,
    scaling: float | Tensor,
    seed: Tensor | None,
    threshold: Tensor | None,
) -> Tensor:
    """y [..., N], differentiable any number of times; ``scaling`` holds the value of what dropout keeps. In a
    graph it is a tensor, for as alpha a number would be a constant of the graph."""
    eager = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    flat = flatten(x)
    source = flat
    if seed is not None and threshold is not None:
        # autograd lets the operator pass for 20 µs
        with torch._C._AutoDispatchBelowAutograd() if eager else nullcontext():
            mask = dropout_mask(seed, threshold, 0, *flat.shape)
        source = torch.where(mask, flat, 0.0)
    q = F.linear(source, lora_A)
    if isinstance(scaling, Tensor) or scaling == 0.0:  # an alpha of 0 would hide a NaN
        q, scaling = q * scaling, 1.0
    if weight is not None:
        y = F.linear(flat, weight, bias)
        # vmap could not write into a y that has no batch of its own
        y = (y.addmm_ if eager else y.addmm)(q, lora_B.mT, alpha=scaling)
    elif base_output is not None:
        y = torch.addmm(base_output.reshape(flat.shape[0], lora_B.shape[0]), q, lora_B.mT, alpha=scaling)
    else:
        y = F.linear(q * scaling, lora_B)
    return unflatten(y, x.shape[:-1])
