"""The primitives as matmuls over the whole pool, for pools small beside what a row chooses: [M, E] products of which
the chosen are kept, and [M, E] coefficients, zero where nothing is chosen.

More arithmetic, at the rate of a large matmul, than reading each chosen row by itself. The scratch, some blocks of rows
[rows, E], is about ``SCRATCH_BYTES``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...reference.routed_lora import accumulation_dtype
from ..cpu_matmul import matmul
from ..views import cast

SCRATCH_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}


def _blocks(t: Tensor, indices: Tensor, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of ``t`` [M, ·], whole groups unless one is too large, and the indices of each row, [rows, k]."""
    M, (G, k) = t.shape[0], indices.shape
    L = M // max(G, 1)
    of_rows = indices[:, None, :].expand(G, L, k)
    most = max(SCRATCH_BYTES.get(t.device.type, SCRATCH_BYTES["cuda"]) // (4 * max(columns, 1)), 64)
    if L > most:
        for g in range(G):
            for start in range(0, L, most):
                stop = min(start + most, L)
                yield slice(g * L + start, g * L + stop), of_rows[g, start:stop]
    elif L:
        for first in range(0, G, most // L):
            last = min(first + most // L, G)
            yield slice(first * L, last * L), of_rows[first:last].reshape(-1, k)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a·b in ``dtype``, that of both or of their sums."""
    if a.dtype == dtype:
        return matmul(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return matmul(cast(a, dtype), cast(b, dtype))


def _scattered(small: Tensor, indices: Tensor, E: int, dtype: torch.dtype) -> Tensor:
    """Coefficients [rows, k] in their places among [rows, E], those of one place added up, rounded to ``dtype``."""
    out = small.new_zeros(small.shape[0], E)
    if small.is_cuda:  # scatter_add_ would add in an order that nothing fixes
        rows = torch.arange(small.shape[0], device=small.device)[:, None]
        out.index_put_((rows, indices), small, accumulate=True)
    else:
        out.scatter_add_(1, indices.long(), small)
    return cast(out, dtype)


def shrink(big: Tensor, experts: Tensor, indices: Tensor) -> Tensor:
    acc = accumulation_dtype(big.dtype)
    pool = cast(experts, big.dtype if big.is_cuda else acc)
    p = big.new_empty(big.shape[0], indices.shape[1], dtype=acc)
    for b, of_rows in _blocks(big, indices, experts.shape[0]):
        rows = big[b] if big.is_cuda else cast(big[b], acc)
        p[b] = _product(rows, pool.mT, acc).gather(1, of_rows.long())
    return p


def expand(small: Tensor, experts: Tensor, indices: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    rounds_at_once = base is None and dtype != small.dtype
    operand = dtype if rounds_at_once or small.is_cuda else small.dtype
    result = dtype if base is None else small.dtype
    pool = cast(experts, operand)
    y = small.new_empty(small.shape[0], experts.shape[1], dtype=dtype if base is None else base.dtype)
    for b, of_rows in _blocks(small, indices, experts.shape[0]):
        total = _product(_scattered(small[b], of_rows, experts.shape[0], operand), pool, result)
        y[b] = total if base is None else total.add_(base[b])
    return y


def order(indices: Tensor, experts: int) -> None:
    """Nothing: every block of rows is summed for all experts."""


def reduce(small: Tensor, big: Tensor, indices: Tensor, order: None, experts: Tensor) -> Tensor:
    acc, E = small.dtype, experts.shape[0]
    total = None
    for b, of_rows in _blocks(small, indices, E):
        rows = big[b] if big.is_cuda else cast(big[b], acc)
        part = _product(_scattered(small[b], of_rows, E, rows.dtype).mT, rows, acc)
        total = part if total is None else total.add_(part)
    return experts.new_zeros(experts.shape) if total is None else cast(total, experts.dtype)
