"""``small``: all sweeps of a matrix in one launch, one program a matrix: V comes from memory once, and from the caches
as often as a sweep needs it."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...declared import Expects
from ...launch import launch
from ...routed_lora.triton.common import dot, load_tile, store_tile, widened
from ...routed_lora.triton.forms import form
from ..algebra import AGAIN, Columns
from .products import SUMMED_ROWS
from .step import step_of_matrix

MOST_ELEMENTS, MOST_COLUMNS = 16384, 16
"""Of a matrix that one program looks after: its fp32 copy fits into the first caches, a product into registers."""

_AGAIN = tl.constexpr(AGAIN)


@triton.jit
def rows_of(V_ptr, strides, x_ptr, row, d, r, BLOCK_D: tl.constexpr, NB: tl.constexpr):
    """Rows of V in fp32, of V·X where there is an X."""
    offs_d, offs_r = row + tl.arange(0, BLOCK_D), tl.arange(0, NB)
    rows = widened(load_tile(V_ptr, strides[1], strides[2], offs_d, offs_r, offs_d < d, offs_r < r))
    if x_ptr is not None:
        X = load_tile(x_ptr, r, 1, offs_r, offs_r, offs_r < r, offs_r < r)
        rows = dot(rows, X, tl.zeros((BLOCK_D, NB), tl.float32), "ieee")
    return rows


@triton.jit
def put_gram(V_ptr, strides, x_ptr, G_ptr, d, r, BLOCK_D: tl.constexpr, NB: tl.constexpr):
    """G = WᵀW in fp64 of W = V, or V·X."""
    acc = tl.zeros((NB, NB), tl.float64)
    for row in range(0, d, BLOCK_D):
        W = rows_of(V_ptr, strides, x_ptr, row, d, r, BLOCK_D, NB)
        acc += dot(W.T, W, tl.zeros((NB, NB), tl.float32), "ieee").to(tl.float64)
    offs = tl.arange(0, NB)
    store_tile(G_ptr, r, 1, offs, offs, offs < r, offs < r, acc)


@triton.jit(do_not_specialize=["d", "batch"])
def small_kernel(
    V_ptr, V_strides, Q_ptr, Q_strides, G_ptr, A_ptr, inverse_ptr, columns_ptr, x_ptr, R_ptr, state_ptr, rank_tol, d, r,
    batch, BLOCK_D: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """One program a matrix. ``A`` and ``x`` [2, batch, r, r] are those of both sweeps."""
    b = tl.program_id(0).to(tl.int64)
    at, others, offs = b * r * r, batch.to(tl.int64) * r * r, tl.arange(0, NB)
    V_ptr, Q_ptr, G_ptr, R_ptr = V_ptr + b * V_strides[0], Q_ptr + b * Q_strides[0], G_ptr + at, R_ptr + at
    A_ptr, inverse_ptr, columns_ptr, x_ptr = A_ptr + at, inverse_ptr + at, columns_ptr + 2 * b * r, x_ptr + at
    second_ptr = x_ptr + others
    put_gram(V_ptr, V_strides, None, G_ptr, d, r, BLOCK_D, NB)
    tl.debug_barrier()
    state = step_of_matrix(G_ptr, None, None, A_ptr, inverse_ptr, columns_ptr, x_ptr, None, R_ptr, rank_tol, 0, r, NB)
    twice = state == _AGAIN
    tl.debug_barrier()
    if twice:
        put_gram(V_ptr, V_strides, x_ptr, G_ptr, d, r, BLOCK_D, NB)
        tl.debug_barrier()
        state = step_of_matrix(
            G_ptr, None, A_ptr, A_ptr + others, inverse_ptr, columns_ptr, second_ptr, None, R_ptr, rank_tol, 0, r, NB
        )
        tl.debug_barrier()
    tl.store(state_ptr + b, state)
    for row in range(0, d, BLOCK_D):
        W = rows_of(V_ptr, V_strides, x_ptr, row, d, r, BLOCK_D, NB)
        if twice:
            X = load_tile(second_ptr, r, 1, offs, offs, offs < r, offs < r)
            W = dot(W, X, tl.zeros((BLOCK_D, NB), tl.float32), "ieee")
        offs_d = row + tl.arange(0, BLOCK_D)
        store_tile(Q_ptr, Q_strides[1], Q_strides[2], offs_d, offs, offs_d < d, offs < r, W)


def small(columns: Columns, rank_tol: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Q, R in fp32 and the states after two sweeps at most; None for matrices with more than
    ``MOST_ELEMENTS`` or ``MOST_COLUMNS``, or beside a basis. Scratch: four fp64 [r, r] a matrix."""
    V, P = columns
    B, d, r = V.shape
    if P is not None or r > MOST_COLUMNS or d * r > MOST_ELEMENTS:
        return None
    Q, state = torch.empty_like(V), torch.empty(B, dtype=torch.int32, device=V.device)
    new = partial(torch.empty, device=V.device)  # each of its own: parts of one are not aligned
    A, G, inverse = (new((n, B, r, r), dtype=torch.float64) for n in (2, 1, 1))
    x, R = new((2, B, r, r), dtype=torch.float32), new((B, r, r), dtype=torch.float32)
    norms = new((B, 2, r), dtype=torch.float64)
    launch(
        small_kernel, (B,), V, V.stride(), Q, Q.stride(), G, A, inverse, norms, x, R, state, rank_tol, d, r, B,
        BLOCK_D=SUMMED_ROWS, NB=MOST_COLUMNS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return Q, R, state


def _form(dtype: str):
    """A launch of ``small_kernel``."""
    strides = ("i32", "i32", 1)
    fp64 = ("G_ptr", "A_ptr", "inverse_ptr", "columns_ptr")
    arguments = {
        "V_ptr": f"*{dtype}", "V_strides": strides, "Q_ptr": f"*{dtype}", "Q_strides": strides, "x_ptr": "*fp32",
        "R_ptr": "*fp32", "state_ptr": "*i32", "rank_tol": "fp32", "d": "i32", "r": "i32", "batch": "i32",
        "BLOCK_D": SUMMED_ROWS, "NB": MOST_COLUMNS,
        **dict.fromkeys(fp64, "*fp64"),
    }  # fmt: skip
    expects = Expects(wgmma=False, single_buffered=("V_ptr", "x_ptr"))  # what is there comes from the caches
    return form(small_kernel, arguments, num_warps=4, num_stages=1, expects=expects)


COMPILATIONS = [_form(dtype) for dtype in ("fp32", "bf16", "fp16")]
