"""``deflate``: the columns one by one in fp64, each projected twice on P and on the columns before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....reference.gram_schmidt import GramSchmidtResult
from ...launch import launch
from ...routed_lora.triton.common import load_tile, programs, store_tile
from ...routed_lora.triton.forms import form
from ..algebra import DONE, Columns

BLOCK_D, BLOCK_C = 128, 16
_DONE = tl.constexpr(DONE)
SCRATCH_BYTES = 256 << 20
"""Most scratch of one launch."""


@triton.jit
def is_finite(ptr, strides, d, n, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr):
    """Whether every element of a matrix [d, n] is."""
    bad = tl.full((), 0, tl.int32)
    for row in range(0, d, BLOCK_D):
        rows = row + tl.arange(0, BLOCK_D)
        for column in range(0, n, BLOCK_C):
            columns = column + tl.arange(0, BLOCK_C)
            tile = load_tile(ptr, strides[1], strides[2], rows, columns, rows < d, columns < n).to(tl.float32)
            bad += tl.sum(tl.sum(tl.where(tile - tile == 0, 0, 1), axis=1), axis=0)
    return bad == 0


@triton.jit
def coefficients(ptr, stride_d, stride_c, w_ptr, c_ptr, d, n, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr):
    """c [n] = basisᵀ·w of a basis [d, n]."""
    for column in range(0, n, BLOCK_C):
        columns = column + tl.arange(0, BLOCK_C)
        sums = tl.zeros((BLOCK_C,), tl.float64)
        for row in range(0, d, BLOCK_D):
            rows = row + tl.arange(0, BLOCK_D)
            tile = load_tile(ptr, stride_d, stride_c, rows, columns, rows < d, columns < n).to(tl.float64)
            sums += tl.sum(tile * tl.load(w_ptr + rows, mask=rows < d, other=0.0)[:, None], axis=0)
        tl.store(c_ptr + columns, sums, mask=columns < n)


@triton.jit
def less_projection(w, rows, ptr, stride_d, stride_c, c_ptr, d, n, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows of w − basis·c."""
    for column in range(0, n, BLOCK_C):
        columns = column + tl.arange(0, BLOCK_C)
        tile = load_tile(ptr, stride_d, stride_c, rows, columns, rows < d, columns < n).to(tl.float64)
        w -= tl.sum(tile * tl.load(c_ptr + columns, mask=columns < n, other=0.0)[None, :], axis=1)
    return w


@triton.jit
def load_column(V_ptr, strides, j, W_ptr, d, BLOCK_D: tl.constexpr):
    """Column j of V goes to column j of W; its squared norm."""
    own = tl.full((), 0.0, tl.float64)
    for row in range(0, d, BLOCK_D):
        rows = (row + tl.arange(0, BLOCK_D)).to(tl.int64)
        v = tl.load(V_ptr + rows * strides[1] + j * strides[2], mask=rows < d, other=0.0).to(tl.float32).to(tl.float64)
        tl.store(W_ptr + j * d + rows, v, mask=rows < d)
        own += tl.sum(v * v, axis=0)
    return own


@triton.jit
def deflate_column(P_ptr, P_strides, W_ptr, c_ptr, sums_ptr, j, d, k, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr):
    """Column j of W [r, d] is projected twice on P and on the columns before it; its squared norm. ``sums`` [r] gets
    what was projected on those."""
    w_ptr = W_ptr + j * d
    left = tl.full((), 0.0, tl.float64)
    for i in range(0, j, BLOCK_C):
        columns = i + tl.arange(0, BLOCK_C)
        tl.store(sums_ptr + columns, tl.zeros((BLOCK_C,), tl.float64), mask=columns < j)
    for _ in range(2):
        tl.debug_barrier()
        if P_ptr is not None:
            coefficients(P_ptr, P_strides[1], P_strides[2], w_ptr, c_ptr, d, k, BLOCK_D, BLOCK_C)
        coefficients(W_ptr, 1, d, w_ptr, c_ptr + k, d, j, BLOCK_D, BLOCK_C)
        tl.debug_barrier()
        left = left * 0
        for row in range(0, d, BLOCK_D):
            rows = row + tl.arange(0, BLOCK_D)
            w = tl.load(w_ptr + rows, mask=rows < d, other=0.0)
            if P_ptr is not None:
                w = less_projection(w, rows, P_ptr, P_strides[1], P_strides[2], c_ptr, d, k, BLOCK_D, BLOCK_C)
            w = less_projection(w, rows, W_ptr, 1, d, c_ptr + k, d, j, BLOCK_D, BLOCK_C)
            tl.store(w_ptr + rows, w, mask=rows < d)
            left += tl.sum(w * w, axis=0)
        for i in range(0, j, BLOCK_C):
            columns = i + tl.arange(0, BLOCK_C)
            c = tl.load(c_ptr + k + columns, mask=columns < j, other=0.0)
            c += tl.load(sums_ptr + columns, mask=columns < j, other=0.0)
            tl.store(sums_ptr + columns, c, mask=columns < j)
    tl.debug_barrier()
    return left


@triton.jit
def put_column(W_ptr, sums_ptr, R_ptr, j, d, r, norm, kept, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr):
    """Column j of W becomes that of Q, zero where it is dropped, and column j of R is written."""
    scale = tl.where(kept, 1.0 / tl.where(kept, norm, 1.0), 0.0)
    for row in range(0, d, BLOCK_D):
        rows = row + tl.arange(0, BLOCK_D)
        w = tl.load(W_ptr + j * d + rows, mask=rows < d, other=0.0)
        tl.store(W_ptr + j * d + rows, w * scale, mask=rows < d)
    for i in range(0, r, BLOCK_C):
        columns = i + tl.arange(0, BLOCK_C)
        c = tl.load(sums_ptr + columns, mask=columns < j, other=0.0)
        c = tl.where(columns == j, tl.where(kept, norm, 0.0), c)
        tl.store(R_ptr + columns * r + j, c.to(tl.float32), mask=columns < r)


@triton.jit
def put_all(W_ptr, Q_ptr, strides, R_ptr, d, r, poison, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr):
    """Q from W, or NaN in Q and R."""
    for row in range(0, d, BLOCK_D):
        rows = row + tl.arange(0, BLOCK_D)
        for column in range(0, r, BLOCK_C):
            columns = column + tl.arange(0, BLOCK_C)
            tile = load_tile(W_ptr, 1, d, rows, columns, rows < d, columns < r)
            tile = tl.where(poison, float("nan"), tile)
            store_tile(Q_ptr, strides[1], strides[2], rows, columns, rows < d, columns < r, tile)
    if poison:
        for i in range(0, r * r, BLOCK_D):
            offs = i + tl.arange(0, BLOCK_D)
            tl.store(R_ptr + offs, tl.full((BLOCK_D,), float("nan"), tl.float32), mask=offs < r * r)


@triton.jit
def deflate_matrix(
    V_ptr, V_strides, P_ptr, P_strides, W_ptr, Q_ptr, Q_strides, R_ptr, rank_ptr, rank_tol, d, k, r,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All columns of one matrix; W is fp64 scratch of r·d + 2·r + k."""
    finite = is_finite(V_ptr, V_strides, d, r, BLOCK_D, BLOCK_C)
    if P_ptr is not None:
        finite &= is_finite(P_ptr, P_strides, d, k, BLOCK_D, BLOCK_C)
    rank = tl.full((), 0, tl.int32)
    sums_ptr = W_ptr + (tl.zeros((), tl.int64) + r) * d
    if finite:
        for step in range(r):
            j = tl.zeros((), tl.int64) + step
            own = load_column(V_ptr, V_strides, j, W_ptr, d, BLOCK_D)
            left = deflate_column(P_ptr, P_strides, W_ptr, sums_ptr + r, sums_ptr, j, d, k, BLOCK_D, BLOCK_C)
            norm = tl.sqrt(left)
            kept = norm > rank_tol * tl.sqrt(own)
            put_column(W_ptr, sums_ptr, R_ptr, j, d, r, norm, kept, BLOCK_D, BLOCK_C)
            rank += kept.to(tl.int32)
            tl.debug_barrier()
    put_all(W_ptr, Q_ptr, Q_strides, R_ptr, d, r, finite == 0, BLOCK_D, BLOCK_C)
    tl.store(rank_ptr, tl.where(finite, rank, -1))


@triton.jit(do_not_specialize=["batch", "d"])
def deflate_kernel(
    V_ptr, V_strides, P_ptr, P_strides, W_ptr, Q_ptr, Q_strides, R_ptr, rank_ptr, state_ptr, rank_tol, batch, d, k,
    r, room, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program takes matrices in turn and deflates, in scratch of its own, those that the sweeps did not get done;
    the others have full rank."""
    W_ptr += tl.program_id(0).to(tl.int64) * room
    for matrix in range(tl.program_id(0), batch, tl.num_programs(0)):
        b = tl.zeros((), tl.int64) + matrix
        if tl.load(state_ptr + b) == _DONE:
            tl.store(rank_ptr + b, r)
        else:
            of_P = P_ptr
            if P_ptr is not None:
                of_P = P_ptr + b * P_strides[0]
            deflate_matrix(
                V_ptr + b * V_strides[0], V_strides, of_P, P_strides, W_ptr, Q_ptr + b * Q_strides[0], Q_strides,
                R_ptr + b * r * r, rank_ptr + b, rank_tol, d, k, r, BLOCK_D, BLOCK_C,
            )  # fmt: skip
            tl.debug_barrier()


def deflate(columns: Columns, Q: Tensor, R: Tensor, state: Tensor, rank_tol: float) -> GramSchmidtResult:
    """Q, R and rank, whose matrices that are not ``DONE`` are made anew. Scratch: an fp64 copy of V for each program,
    of ``SCRATCH_BYTES`` at most but where one copy is more."""
    V, P = columns
    B, d, r = V.shape
    k = 0 if P is None else P.shape[2]
    room = r * d + 2 * r + k
    slots = min(B, 2 * programs(V), max(SCRATCH_BYTES // (8 * room), 1))
    W = torch.empty((slots, room), dtype=torch.float64, device=V.device)
    rank = torch.empty_like(state)
    launch(
        deflate_kernel, (slots,),
        V, V.stride(), P, None if P is None else P.stride(), W, Q, Q.stride(), R, rank, state, rank_tol, B, d, k, r,
        room, BLOCK_D=BLOCK_D, BLOCK_C=BLOCK_C, num_warps=8, num_stages=1,
    )  # fmt: skip
    return GramSchmidtResult(Q, R, rank)


def _form(dtype: str, basis: bool):
    """A launch of ``deflate_kernel``."""
    strides = ("i32", "i32", 1)
    arguments = {
        "V_ptr": f"*{dtype}", "V_strides": strides, "P_ptr": "*fp32" if basis else None,
        "P_strides": strides if basis else None, "W_ptr": "*fp64", "Q_ptr": f"*{dtype}", "Q_strides": strides,
        "R_ptr": "*fp32", "rank_ptr": "*i32", "state_ptr": "*i32", "rank_tol": "fp32", "batch": "i32", "d": "i32",
        "k": "i32", "r": "i32", "room": "i32", "BLOCK_D": BLOCK_D, "BLOCK_C": BLOCK_C,
    }  # fmt: skip
    return form(deflate_kernel, arguments, num_warps=8, num_stages=1)


COMPILATIONS = [_form("fp32", False), _form("bf16", True), _form("fp16", False)]
