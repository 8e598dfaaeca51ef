"""The primitives on ATen, for any device, dtype and shape: chosen rows are copied for a block of groups at a time, as
many as ``SCRATCH_BYTES`` holds, and multiplied in the accumulation dtype.

reduce is the backward of an embedding, which torch sums in a fixed order on every device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...reference.routed_lora import accumulation_dtype
from ..views import cast
from .algebra import of_groups

SCRATCH_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


def _scratch(t: Tensor) -> int:
    return SCRATCH_BYTES.get(t.device.type, SCRATCH_BYTES["cuda"])


def _blocks(groups: int, bytes_of_one: int, scratch: int) -> Iterator[slice]:
    """Blocks of groups whose copies fit."""
    size = max(scratch // max(bytes_of_one, 1), 1)
    for start in range(0, groups, size):
        yield slice(start, min(start + size, groups))


def shrink(big: Tensor, experts: Tensor, indices: Tensor) -> Tensor:
    acc, (G, k), n = accumulation_dtype(big.dtype), indices.shape, experts.shape[1]
    rows = of_groups(big, G)
    L = rows.shape[1]
    out = big.new_empty(G, L, k, dtype=acc)
    for b in _blocks(G, acc.itemsize * n * (k + L), _scratch(big)):
        chosen = cast(experts[indices[b]], acc)
        torch.matmul(rows[b].to(acc), chosen.mT, out=out[b])
    return out.reshape(G * L, k)


def expand(small: Tensor, experts: Tensor, indices: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    (G, k), n = indices.shape, experts.shape[1]
    coefficients = of_groups(small, G)
    L = coefficients.shape[1]
    y = small.new_empty(G, L, n, dtype=dtype if base is None else base.dtype)
    bases = None if base is None else of_groups(base, G)
    for b in _blocks(G, small.element_size() * n * (k + L), _scratch(small)):
        total = coefficients[b] @ cast(experts[indices[b]], small.dtype)
        y[b] = total if bases is None else total + bases[b]
    return y.reshape(G * L, n)


def order(indices: Tensor, experts: int) -> None:
    """Nothing: torch sorts by itself."""


def reduce(small: Tensor, big: Tensor, indices: Tensor, order: None, experts: Tensor) -> Tensor:
    (G, k), (E, n), acc = indices.shape, experts.shape, small.dtype
    coefficients, rows = of_groups(small, G), of_groups(big, G)
    L = rows.shape[1]
    total = None
    scratch = max(_scratch(big), acc.itemsize * E * n)  # each block gives a sum of the size of the pool
    for b in _blocks(G, acc.itemsize * n * (k + L), scratch):
        products = (coefficients[b].mT @ rows[b].to(acc)).reshape(-1, n)
        part = torch.ops.aten.embedding_dense_backward(products, indices[b].reshape(-1), E, -1, False)
        total = part if total is None else total.add_(part)
    return experts.new_zeros(experts.shape) if total is None else cast(total, experts.dtype)
