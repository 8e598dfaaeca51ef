"""``linear``: the large output, frozen products and low-rank terms in one fp32 sum that is rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...launch import Described, cdiv, launch
from ..algebra import Dropout
from ..tables import table_of
from ..tiles import INTERPRETER, LinearTile, key_of, look_up
from .common import block_of_rank, capability, on_device_of, precision, programs, scalar_on
from .linear_kernels import linear_kernel, linear_tma_kernel, most_ranks

MOST_DESCRIBED = 3
"""Products the kernel with descriptors takes: those of q, k and v."""

TMA_CLASSES = {90, INTERPRETER}
"""Classes of compute capability whose tiles come by TMA; the interpreter plays it."""

Products = list[tuple[Tensor, Tensor]]
LowRank = list[tuple[Tensor, Tensor, Dropout | None]]


def linear(
    products: Products, low_rank: LowRank, bias: Tensor | None = None, base_output: Tensor | None = None
) -> Tensor:
    """Σ a_i·b_i + Σ mask_j ⊙ (q_j·C_j) + bias + base_output [M, N], in base_output's dtype or that of the operands.

    a [M, K], b [K, N], q [M, r] and C [r, N] of one dtype, any strides; bias [N] and base_output [M, N] of any. The sum
    is fp32 throughout. No scratch. From compute capability 9.0 on tiles come and go by TMA where layout and alignment
    allow it (see ``describe``), elsewhere by pointers.
    """
    q, C, _ = low_rank[0]
    M, N = q.shape[0], C.shape[1]
    y = torch.empty((M, N), dtype=q.dtype if base_output is None else base_output.dtype, device=q.device)
    if y.numel():
        with on_device_of(q):
            _launch(products, low_rank, bias, base_output, y)
    return y


def _launch(products: Products, low_rank: LowRank, bias: Tensor | None, base_output: Tensor | None, y: Tensor) -> None:
    (M, N), q = y.shape, low_rank[0][0]
    r, terms = max([C.shape[0] for _, C, _ in low_rank]), max(len(products), len(low_rank))
    K = max([b.shape[0] for _, b in products], default=0)
    masked, kind = any([d is not None for _, _, d in low_rank]), capability(y)
    described = describe(products, y) if kind in TMA_CLASSES else None
    key = key_of("linear", kind, q.dtype, M, N, K, block_of_rank(r), terms, masked, described is not None)
    tile: LinearTile = look_up(key, table_of(y).tiles)
    block_r = block_of_rank(r, most_ranks(q.dtype.itemsize))
    shared = dict(
        TERMS=len(low_rank), RANK_TILES=cdiv(r, block_r), HAS_DROPOUT=masked, PRECISION=precision(q.dtype),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=block_r, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    tiles = cdiv(M, tile.block_m) * cdiv(N, tile.block_n)
    grid = (min(tile.per_sm * programs(y), tiles),)
    low = _terms(low_rank, y.device)
    outer = (
        bias, 0 if bias is None else bias.stride(0),
        base_output, *((0, 0) if base_output is None else base_output.stride()),
    )  # fmt: skip
    if described is not None:
        descriptors, depths = _in_blocks(*described, tile)
        launch(
            linear_tma_kernel, grid, *descriptors, *depths, *low, *outer, M, N,
            PRODUCTS=len(products), B_TRANSPOSED=described[1], **shared,
        )  # fmt: skip
        return
    launch(linear_kernel, grid, *_by_pointers(products), *low, *outer, y, M, N, PRODUCTS=len(products), **shared)


def _by_pointers(products: Products) -> tuple[tuple[Any, ...], ...]:
    """The products as the kernel without descriptors takes them, a tuple for each kind of argument."""
    if not products:  # no launch takes an empty tuple
        return (None,), (0,), (0,), (None,), (0,), (0,), (0,)
    return tuple(zip(*[(a, *a.stride(), b, *b.stride(), b.shape[0]) for a, b in products], strict=True))


def _terms(low_rank: LowRank, device: torch.device) -> tuple[tuple[Any, ...], ...]:
    """The low-rank terms as the kernels take them, a tuple for each kind of argument."""
    rows = []
    for q, C, d in low_rank:
        draw = (None, None) if d is None else (d.seed, scalar_on(device, d.threshold))
        rows.append((q, *q.stride(), C, *C.stride(), C.shape[0], *draw))
    return tuple(zip(*rows, strict=True))


def describe(products: Products, y: Tensor) -> tuple[list[Described], bool] | None:
    """a_1, b_1, .., y as TMA takes them, and whether each b is read as [N, K] and transposed; None where it does not
    take them all: all b must lie alike, [K, N] or transposed [N, K], and y must have their dtype."""
    if not 1 <= len(products) <= MOST_DESCRIBED or y.dtype != products[0][0].dtype:
        return None
    transposed = products[0][1].stride(1) != 1
    found = [Described(y)]
    for a, b in products:
        found[-1:-1] = [Described(a), Described(b, transposed)]
    return (found, transposed) if all([one.fits() for one in found]) else None


def _in_blocks(found: list[Described], transposed: bool, tile: LinearTile) -> tuple[list[Any], list[Any]]:
    """The descriptors as the kernel takes them, in the blocks of a tile, and the depth of each product; None where
    there is no product."""
    *operands, y = found
    of_b = [tile.block_n, tile.block_k] if transposed else [tile.block_k, tile.block_n]
    for a, b in zip(operands[::2], operands[1::2], strict=True):
        a.block_shape, b.block_shape = [tile.block_m, tile.block_k], of_b
    y.block_shape = [tile.block_m, tile.block_n]
    depths: list[Any] = [a.shape[1] for a in operands[::2]]
    missing = MOST_DESCRIBED - len(depths)
    return [*operands, *[None] * (2 * missing), y], depths + [None] * missing
