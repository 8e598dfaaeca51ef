"""``step``: the r×r work of a sweep in fp64, one program a matrix."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch
from ...routed_lora.triton.common import load_tile, store_tile
from ...routed_lora.triton.forms import form
from ..algebra import AGAIN, BASIS, DONE, ENOUGH, FAITHFUL, HARD, STABLE, Columns
from .blocks import block_at, cholesky, invert, offsets, product, put_block, unit_columns
from .products import block_of, goes_again, warps_of

GRAM_ERROR = 1.0
"""Error of an entry of a Gram matrix of unit columns in roundoffs of fp32, whose sums are ``SUMMED_ROWS`` long."""
LIMIT = 2.0**40
"""Norms of columns beyond it, or below its inverse, are left to fp64: their squares are no fp32 numbers."""

_DONE, _AGAIN, _HARD = tl.constexpr(DONE), tl.constexpr(AGAIN), tl.constexpr(HARD)
_ENOUGH, _STABLE, _FAITHFUL = tl.constexpr(ENOUGH), tl.constexpr(STABLE), tl.constexpr(FAITHFUL)
_BASIS, _GRAM_ERROR, _LIMIT = tl.constexpr(BASIS), tl.constexpr(GRAM_ERROR), tl.constexpr(LIMIT)
_ROUNDOFF = tl.constexpr(2.0**-24)  # of fp32, in which products are summed and applied


@triton.jit
def scaled_rows(X_ptr, norms_ptr, x_ptr, r, NB: tl.constexpr):
    """X becomes what is applied to columns as they are, and ``x`` that in fp32."""
    blocks = tl.cdiv(r, NB)
    for i in range(blocks):
        rows, mask_rows = offsets(i, r, NB)
        norms = tl.load(norms_ptr + rows, mask=mask_rows, other=1.0)
        for j in range(blocks):
            tile = tl.zeros((NB, NB), tl.float64)
            if j >= i:
                tile = block_at(X_ptr, r, i, j, r, NB) / norms[:, None]
                put_block(X_ptr, r, i, j, r, tile, NB)
            put_block(x_ptr, r, i, j, r, tile, NB)


@triton.jit
def of_basis(S_ptr, X_ptr, t_ptr, k, r, NB: tl.constexpr):
    """−T = −S·X in fp32."""
    for i in range(tl.cdiv(k, NB)):
        rows, mask_rows = offsets(i, k, NB)
        for j in range(tl.cdiv(r, NB)):
            columns, mask_columns = offsets(j, r, NB)
            end = tl.minimum(j * NB + NB, r)
            tile = tl.zeros((NB, NB), tl.float64)
            tile = product(tile, S_ptr, r, 1, rows, mask_rows, X_ptr, r, columns, mask_columns, 0, end)
            store_tile(t_ptr, r, 1, rows, columns, mask_rows, mask_columns, -tile)


@triton.jit
def squares_of_rows(ptr, count, r, upper: tl.constexpr, NB: tl.constexpr):
    """The sum of all squares of a matrix [count, r], and the largest of a row."""
    total, largest = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for i in range(tl.cdiv(count, NB)):
        rows, mask_rows = offsets(i, count, NB)
        sums = tl.zeros((NB,), tl.float64)
        first = i if upper else 0
        for j in range(first, tl.cdiv(r, NB)):
            columns, mask_columns = offsets(j, r, NB)
            tile = load_tile(ptr, r, 1, rows, columns, mask_rows, mask_columns).to(tl.float64)
            sums += tl.sum(tile * tile, axis=1)
        total += tl.sum(sums, axis=0)
        largest = tl.maximum(largest, tl.max(sums, axis=0))
    return total, largest


@triton.jit
def squares_of_columns(X_ptr, out_ptr, r, NB: tl.constexpr):
    """For each column of X the sum of its squares."""
    for j in range(tl.cdiv(r, NB)):
        columns, mask_columns = offsets(j, r, NB)
        sums = tl.zeros((NB,), tl.float64)
        for i in range(j + 1):
            tile = block_at(X_ptr, r, i, j, r, NB)
            sums += tl.sum(tile * tile, axis=0)
        tl.store(out_ptr + columns, sums, mask=mask_columns)


@triton.jit
def add_squares(t_ptr, out_ptr, k, r, NB: tl.constexpr):
    """The squares of the columns of T [k, r] are added."""
    for j in range(tl.cdiv(r, NB)):
        columns, mask_columns = offsets(j, r, NB)
        sums = tl.load(out_ptr + columns, mask=mask_columns, other=0.0)
        for i in range(tl.cdiv(k, NB)):
            rows, mask_rows = offsets(i, k, NB)
            tile = load_tile(t_ptr, r, 1, rows, columns, mask_rows, mask_columns).to(tl.float64)
            sums += tl.sum(tile * tile, axis=0)
        tl.store(out_ptr + columns, sums, mask=mask_columns)


@triton.jit
def worst_column(R_ptr, squares_ptr, r, NB: tl.constexpr):
    """The largest Σ_k squares_k·R_kj² of a column j, and the least diagonal element of R."""
    worst, pivot = tl.full((), 0.0, tl.float64), tl.full((), 1.0, tl.float64)
    for j in range(tl.cdiv(r, NB)):
        columns, mask_columns = offsets(j, r, NB)
        sums = tl.zeros((NB,), tl.float64)
        for i in range(j + 1):
            rows, mask_rows = offsets(i, r, NB)
            squares = tl.load(squares_ptr + rows, mask=mask_rows, other=0.0)
            tile = block_at(R_ptr, r, i, j, r, NB)
            sums += tl.sum(squares[:, None] * tile * tile, axis=0)
        worst = tl.maximum(worst, tl.max(sums, axis=0))
        diagonal = tl.load(R_ptr + columns * (r + 1), mask=mask_columns, other=1.0)
        pivot = tl.minimum(pivot, tl.min(diagonal, axis=0))
    return worst, pivot


@triton.jit
def put_R(A_ptr, norms_ptr, before_ptr, R_ptr, r, NB: tl.constexpr):
    """A becomes R of columns as they are; R that, after the A of an earlier sweep, with zeros below the diagonal."""
    blocks = tl.cdiv(r, NB)
    for j in range(blocks):
        columns, mask_columns = offsets(j, r, NB)
        norms = tl.load(norms_ptr + columns, mask=mask_columns, other=1.0)
        for i in range(j + 1):
            put_block(A_ptr, r, i, j, r, block_at(A_ptr, r, i, j, r, NB) * norms[None, :], NB)
    tl.debug_barrier()
    for i in range(blocks):
        rows, mask_rows = offsets(i, r, NB)
        for j in range(blocks):
            columns, mask_columns = offsets(j, r, NB)
            tile = tl.zeros((NB, NB), tl.float64)
            if j >= i:
                if before_ptr is None:
                    tile = block_at(A_ptr, r, i, j, r, NB)
                else:
                    end = tl.minimum(j * NB + NB, r)
                    tile = product(
                        tile, A_ptr, r, 1, rows, mask_rows, before_ptr, r, columns, mask_columns, i * NB, end
                    )
            put_block(R_ptr, r, i, j, r, tile, NB)


@triton.jit
def put_norms(G_ptr, norms_ptr, r, NB: tl.constexpr):
    """The norms of the columns; how many are out of bounds, or no numbers."""
    lost = tl.full((), 0, tl.int32)
    for j in range(tl.cdiv(r, NB)):
        columns, mask_columns = offsets(j, r, NB)
        norms = tl.sqrt(tl.load(G_ptr + columns * (r + 1), mask=mask_columns, other=1.0))
        sound = (norms > 1 / _LIMIT) & (norms < _LIMIT)
        lost += tl.sum(tl.where(sound, 0, 1), axis=0)
        tl.store(norms_ptr + columns, norms, mask=mask_columns)
    return lost


@triton.jit
def step_of_matrix(
    G_ptr, S_ptr, before_ptr, A_ptr, X_ptr, norms_ptr, x_ptr, t_ptr, R_ptr, rank_tol, k, r, NB: tl.constexpr
):  # fmt: skip
    """The step of one matrix, its state. ``A``, ``X`` [r, r] and ``norms`` [2, r] are fp64 scratch; where the state is
    HARD, x, t and R may hold anything."""
    state = tl.full((), _HARD, tl.int32)
    lost = put_norms(G_ptr, norms_ptr, r, NB)
    tl.debug_barrier()
    if lost == 0:
        total = unit_columns(G_ptr, S_ptr, A_ptr, norms_ptr, k, r, NB)
        tl.debug_barrier()
        if cholesky(A_ptr, X_ptr, r, NB) > 0:
            invert(A_ptr, X_ptr, r, NB)
            tl.debug_barrier()
            of_X, largest = squares_of_rows(X_ptr, r, r, True, NB)
            of_T = tl.full((), 0.0, tl.float64)
            squares_of_columns(X_ptr, norms_ptr + r, r, NB)
            tl.debug_barrier()
            scaled_rows(X_ptr, norms_ptr, x_ptr, r, NB)
            tl.debug_barrier()
            if S_ptr is not None:
                of_basis(S_ptr, X_ptr, t_ptr, k, r, NB)
                tl.debug_barrier()
                of_T, largest_T = squares_of_rows(t_ptr, k, r, False, NB)
                largest = tl.maximum(largest, largest_T)
                add_squares(t_ptr, norms_ptr + r, k, r, NB)
                tl.debug_barrier()
            worst, pivot = worst_column(A_ptr, norms_ptr + r, r, NB)
            tl.debug_barrier()
            put_R(A_ptr, norms_ptr, before_ptr, R_ptr, r, NB)
            root = tl.sqrt(tl.zeros((), tl.float64) + r)
            of_gram = tl.sqrt(total) * largest * (_GRAM_ERROR * _ROUNDOFF)
            error = of_gram + (tl.sqrt(of_X) + tl.sqrt(of_T) * _BASIS) * _ROUNDOFF
            sound = (of_gram <= _STABLE) & (tl.sqrt(worst) <= root * _FAITHFUL) & (pivot > rank_tol * 1.1)
            after = tl.where(error <= root * (_ENOUGH * _ROUNDOFF), _DONE, _AGAIN)
            state = tl.where(sound, after, _HARD)
    return state


@triton.jit
def add_parts(parts_ptr, splits, stride, size, BLOCK: tl.constexpr):
    """The first of ``splits`` parts becomes their sum, in their order."""
    if splits > 1:
        for first in range(0, size, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            acc = tl.zeros((BLOCK,), tl.float64)
            for part in range(splits):
                acc += tl.load(parts_ptr + part * stride + offs, mask=offs < size, other=0.0)
            tl.store(parts_ptr + offs, acc, mask=offs < size)


@triton.jit(do_not_specialize=["batch", "splits"])
def step_kernel(
    G_ptr, S_ptr, first_ptr, before_ptr, A_ptr, inverse_ptr, columns_ptr, x_ptr, t_ptr, R_ptr, state_ptr, rank_tol,
    batch, splits, k, r, NB: tl.constexpr,
):  # fmt: skip
    """One program a matrix; pointers as in ``step_of_matrix``, of all matrices; G and S in parts. With ``first``, the
    states of a first sweep, it is the second, of those that go again; the state of the others stays."""
    b = tl.program_id(0).to(tl.int64)
    if first_ptr is not None:
        if not goes_again(first_ptr, b):
            tl.store(state_ptr + b, tl.load(first_ptr + b))
            return
    at = b * r * r
    add_parts(G_ptr + at, splits, batch.to(tl.int64) * r * r, r * r, NB * NB)
    if S_ptr is not None:
        S_ptr, t_ptr = S_ptr + b * k * r, t_ptr + b * k * r
        add_parts(S_ptr, splits, batch.to(tl.int64) * k * r, k * r, NB * NB)
    if before_ptr is not None:
        before_ptr += at
    tl.debug_barrier()
    state = step_of_matrix(
        G_ptr + at, S_ptr, before_ptr, A_ptr + at, inverse_ptr + at, columns_ptr + 2 * b * r, x_ptr + at, t_ptr,
        R_ptr + at, rank_tol, k, r, NB,
    )  # fmt: skip
    tl.store(state_ptr + b, state)


class Work(NamedTuple):
    """What the steps of both sweeps write: x = X, t = −T and R in fp32, and fp64 scratch, of which the second sweep
    needs the ``A`` of the first."""

    A: tuple[Tensor, Tensor]
    inverse: Tensor
    columns: Tensor
    x: Tensor
    t: Tensor | None
    R: Tensor
    state: tuple[Tensor, Tensor]

    @classmethod
    def empty(cls, columns: Columns) -> Work:
        V, P = columns
        B, _, r = V.shape
        small = partial(torch.empty, (B, r, r), device=V.device)  # each of its own: parts of one are not aligned
        states = [torch.empty((B,), dtype=torch.int32, device=V.device) for _ in range(2)]
        return cls(
            A=(small(dtype=torch.float64), small(dtype=torch.float64)),
            inverse=small(dtype=torch.float64),
            columns=torch.empty((B, 2, r), dtype=torch.float64, device=V.device),
            x=small(dtype=torch.float32),
            t=None if P is None else torch.empty((B, P.shape[2], r), dtype=torch.float32, device=V.device),
            R=small(dtype=torch.float32),
            state=(states[0], states[1]),
        )


def step(G: Tensor, S: Tensor | None, rank_tol: float, work: Work, second: bool) -> None:
    """Write the sweep that G [splits, B, r, r] and S [splits, B, k, r] ask for, fp64 and contiguous."""
    splits, B, r, _ = G.shape
    first, before = (work.state[0], work.A[0]) if second else (None, None)
    NB = block_of(r)
    launch(
        step_kernel, (B,), G, S, first, before, work.A[second], work.inverse, work.columns, work.x, work.t, work.R,
        work.state[second], rank_tol, B, splits, 0 if S is None else S.shape[2], r,
        NB=NB, num_warps=warps_of(NB), num_stages=1,
    )  # fmt: skip


def _form(columns: int, basis: bool, again: bool):
    """A launch of ``step_kernel``, of a first sweep or, with ``again``, of a second."""
    arguments = {
        "G_ptr": "*fp64", "S_ptr": "*fp64" if basis else None, "first_ptr": "*i32" if again else None,
        "before_ptr": "*fp64" if again else None, "A_ptr": "*fp64", "inverse_ptr": "*fp64", "columns_ptr": "*fp64",
        "x_ptr": "*fp32", "t_ptr": "*fp32" if basis else None, "R_ptr": "*fp32", "state_ptr": "*i32",
        "rank_tol": "fp32", "batch": "i32", "splits": "i32", "k": "i32" if basis else 0, "r": "i32", "NB": columns,
    }  # fmt: skip
    return form(step_kernel, arguments, num_warps=warps_of(columns), num_stages=1)


COMPILATIONS = [
    _form(16, False, False),
    _form(16, True, True),
    _form(32, True, False),
    _form(64, False, False),
    _form(64, True, True),
]
