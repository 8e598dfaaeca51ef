"""All of Gram-Schmidt as one compiled call each way on the CPU (``csrc/gram_schmidt.cpp``): each matrix goes through
its sweeps, and its deflation where it needs one, while it lies in the caches; one call serves a list of any shapes.

The algorithm, its judgement and its letters are those of ``algebra``; Gram matrices are summed in fp32 over short
chains and in fp64 over those. A matrix' bits depend on nothing but itself and its basis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import extension
from ...reference.gram_schmidt import GramSchmidtResult, empty_result
from .algebra import Columns, Outputs

_OPERATORS = torch.ops.clora_kernels
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(V: Tensor) -> str:
    """Why the compiled operators cannot take V; empty if they can."""
    if V.dtype not in _DTYPES:
        return f"it is not built for {V.dtype}"
    if not V.is_cpu:
        return f"it runs on the CPU, not on {V.device.type}"
    return "" if extension.has_op("gram_schmidt_sweeps", "cpu") else extension.CPU_MISSING


def forward(columns: Sequence[Columns], rank_tol: float) -> list[GramSchmidtResult]:
    """As ``algebra.forward`` of each."""
    filled = [c for c in columns if c.V.numel()]
    n = len(filled)
    out = _OPERATORS.gram_schmidt_sweeps.default([c.V for c in filled], _bases(filled), rank_tol) if n else []
    found = [GramSchmidtResult(out[i], out[n + i], out[2 * n + i]) for i in range(n)]
    if n == len(columns):
        return found
    rest = iter(found)
    return [next(rest) if c.V.numel() else empty_result(c.V) for c in columns]


def backward(
    outputs: Sequence[Outputs], columns: Sequence[Columns], need_V: bool, need_P: bool
) -> list[tuple[Tensor | None, Tensor | None]]:
    """As ``algebra.backward`` of each."""
    filled = [i for i, c in enumerate(columns) if c.V.numel()]
    some, chosen = [outputs[i] for i in filled], [columns[i] for i in filled]
    gradients = _OPERATORS.gram_schmidt_gradients.default
    out = []
    if filled:
        dR, R = [o.dR.contiguous() for o in some], [o.R.contiguous() for o in some]
        bases = _bases(chosen)
        out = gradients([o.dQ for o in some], dR, [c.V for c in chosen], bases, [o.Q for o in some], R, need_V, need_P)
    dPs = out[len(filled) :] or [None] * len(filled)
    found = dict(zip(filled, zip(out[: len(filled)], dPs, strict=True), strict=True))
    result: list[tuple[Tensor | None, Tensor | None]] = []
    for i, (V, P) in enumerate(columns):
        dV, dP = found[i] if i in found else (torch.zeros_like(V), None if P is None else torch.zeros_like(P).float())
        result.append((dV if need_V else None, dP if need_P and P is not None else None))
    return result


def _bases(columns: Sequence[Columns]) -> list[Tensor]:
    """For each its basis in a dtype that the operators take, one without columns for none; an empty list for none at
    all."""
    if all(c.P is None for c in columns):
        return []
    return [c.V.narrow(2, 0, 0) if c.P is None else c.P if c.P.dtype in _DTYPES else c.P.float() for c in columns]


if extension.has_op("gram_schmidt_sweeps", "cpu"):

    @torch.library.register_fake("clora_kernels::gram_schmidt_sweeps")
    def _(V: list[Tensor], P: list[Tensor], rank_tol: float) -> list[Tensor]:
        return [
            *(torch.empty_like(t) for t in V),
            *(t.new_empty(t.shape[0], t.shape[2], t.shape[2], dtype=torch.float32) for t in V),
            *(t.new_empty(t.shape[0], dtype=torch.int32) for t in V),
        ]

    @torch.library.register_fake("clora_kernels::gram_schmidt_gradients")
    def _(
        dQ: list[Tensor],
        dR: list[Tensor],
        V: list[Tensor],
        P: list[Tensor],
        Q: list[Tensor],
        R: list[Tensor],
        need_V: bool,
        need_P: bool,
    ) -> list[Tensor]:
        return [
            *(torch.empty_like(t) if need_V else t.new_empty(0) for t in V),
            *(t.new_empty(t.shape if need_P else 0, dtype=torch.float32) for t in P),
        ]
