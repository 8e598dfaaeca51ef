r"""``solve``: the r×r work of backward in fp64, one program a matrix.

Independent columns J and dependent ones D are told apart by the diagonal of R, and both share their products: U holds
R_JJ and −dR_JD, H holds dR_JJ and (QᵀV)_JD, so that the lower triangle of M = R_JJ·dR_JJᵀ − QᵀdQᵀ − dR_JD·(QᵀV)_JDᵀ
is that of U·Hᵀ − QᵀdQᵀ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch
from ...routed_lora.triton.common import load_tile, on_device_of, store_tile
from ...routed_lora.triton.forms import form
from .blocks import block_at, inverse_of_block, invert, offsets, product, put_block
from .products import block_of, warps_of


@triton.jit
def columns_of(block, R_ptr, r, NB: tl.constexpr):
    """Indices of a block of columns, which are there, and which of these are independent: NaN is, padding is not."""
    offs, mask = offsets(block, r, NB)
    return offs, mask, tl.load(R_ptr + offs * (r + 1), mask=mask, other=0.0) != 0


@triton.jit
def put_diagonal_inverses(R_ptr, X_ptr, r, NB: tl.constexpr):
    """The diagonal blocks of the inverse of R_JJ, of the identity in the rows and columns D."""
    offs = tl.arange(0, NB)
    for b in range(tl.cdiv(r, NB)):
        rows, _, kept = columns_of(b, R_ptr, r, NB)
        eye = tl.where(offs[:, None] == offs[None, :], 1.0, 0.0)
        D = load_tile(R_ptr, r, 1, rows, rows, kept, kept).to(tl.float64)
        D = tl.where(kept[:, None] & kept[None, :], D, eye)
        put_block(X_ptr, r, b, b, r, inverse_of_block(D, NB), NB)


@triton.jit
def put_factors(R_ptr, dR_ptr, dR_strides, QV_ptr, U_ptr, H_ptr, r, NB: tl.constexpr):
    """U = R_JJ − dR_JD, and the transposed of H = dR_JJ + (QᵀV)_JD."""
    blocks = tl.cdiv(r, NB)
    for i in range(blocks):
        rows, mask_rows, kept_rows = columns_of(i, R_ptr, r, NB)
        for j in range(blocks):
            columns, mask_columns, kept = columns_of(j, R_ptr, r, NB)
            upper = rows[:, None] <= columns[None, :]
            of_R = load_tile(R_ptr, r, 1, rows, columns, kept_rows, kept)
            of_dR = load_tile(dR_ptr, dR_strides[1], dR_strides[2], rows, columns, kept_rows, mask_columns)
            of_dR = tl.where(upper, of_dR.to(tl.float64), 0.0)
            of_QV = load_tile(QV_ptr, r, 1, rows, columns, kept_rows, mask_columns & (kept == 0))
            U = tl.where(kept[None, :], tl.where(upper, of_R.to(tl.float64), 0.0), -of_dR)
            put_block(U_ptr, r, i, j, r, U, NB)
            H = tl.where(kept[None, :], of_dR, of_QV.to(tl.float64))
            store_tile(H_ptr, 1, r, rows, columns, mask_rows, mask_columns, H)


@triton.jit
def put_Y(R_ptr, X_ptr, y_ptr, Y_ptr, r, NB: tl.constexpr):
    """Y with Y_JJ = R_JJ⁻ᵀ, in fp64 and as it is returned."""
    blocks = tl.cdiv(r, NB)
    for i in range(blocks):
        rows, _, kept_rows = columns_of(i, R_ptr, r, NB)
        for j in range(blocks):
            columns, _, kept = columns_of(j, R_ptr, r, NB)
            tile = load_tile(X_ptr, 1, r, rows, columns, kept_rows & (i >= j), kept)
            put_block(y_ptr, r, i, j, r, tile, NB)
            put_block(Y_ptr, r, i, j, r, tile, NB)


@triton.jit
def put_mirrored(R_ptr, QdQ_ptr, U_ptr, H_ptr, M_ptr, r, NB: tl.constexpr):
    """The lower triangle of M, mirrored."""
    for i in range(tl.cdiv(r, NB)):
        rows, mask_rows, kept_rows = columns_of(i, R_ptr, r, NB)
        for j in range(i + 1):
            columns, mask_columns, kept = columns_of(j, R_ptr, r, NB)
            tile = -load_tile(QdQ_ptr, 1, r, rows, columns, kept_rows, kept).to(tl.float64)
            tile = product(tile, U_ptr, r, 1, rows, kept_rows, H_ptr, r, columns, kept, i * NB, r)
            if i == j:
                tile = tl.where(rows[:, None] >= columns[None, :], tile, tl.trans(tile))
            else:
                store_tile(M_ptr, 1, r, rows, columns, mask_rows, mask_columns, tile)
            put_block(M_ptr, r, i, j, r, tile, NB)


@triton.jit
def put_Z_and_N(R_ptr, U_ptr, M_ptr, y_ptr, Z_ptr, N_ptr, r, NB: tl.constexpr):
    """Z = M·Y + dR_JD and N = dR_JDᵀ·Y."""
    blocks = tl.cdiv(r, NB)
    for i in range(blocks):
        rows, mask_rows, kept_rows = columns_of(i, R_ptr, r, NB)
        dropped = mask_rows & (kept_rows == 0)
        end = tl.where(tl.sum(dropped.to(tl.int32), axis=0) > 0, tl.minimum(i * NB + NB, r), 0)
        for j in range(blocks):
            columns, mask_columns, kept = columns_of(j, R_ptr, r, NB)
            zeros = tl.zeros((NB, NB), tl.float64)
            Z = product(zeros, M_ptr, r, 1, rows, mask_rows, y_ptr, r, columns, mask_columns, j * NB, r)
            Z = tl.where(kept[None, :], Z, -block_at(U_ptr, r, i, j, r, NB))
            put_block(Z_ptr, r, i, j, r, Z, NB)
            N = product(zeros, U_ptr, 1, r, rows, dropped, y_ptr, r, columns, mask_columns, j * NB, end)
            put_block(N_ptr, r, i, j, r, -N, NB)


@triton.jit
def solve_kernel(
    R_ptr, dR_ptr, dR_strides, QdQ_ptr, QV_ptr, scratch_ptr, Y_ptr, Z_ptr, N_ptr, r, NB: tl.constexpr
):  # fmt: skip
    """One program a matrix; ``scratch`` [batch, 4, r, r] is fp64."""
    b = tl.program_id(0).to(tl.int64)
    size = r * r
    at = b * size
    R_ptr, dR_ptr, QdQ_ptr, QV_ptr = R_ptr + at, dR_ptr + b * dR_strides[0], QdQ_ptr + at, QV_ptr + at
    U_ptr = scratch_ptr + 4 * at
    H_ptr, X_ptr, y_ptr = U_ptr + size, U_ptr + 2 * size, U_ptr + 3 * size
    put_diagonal_inverses(R_ptr, X_ptr, r, NB)  # first: later its divisions would spill
    put_factors(R_ptr, dR_ptr, dR_strides, QV_ptr, U_ptr, H_ptr, r, NB)
    tl.debug_barrier()
    invert(U_ptr, X_ptr, r, NB)  # columns D of U spoil but those of X: rows D of U are zero
    tl.debug_barrier()
    put_Y(R_ptr, X_ptr, y_ptr, Y_ptr + at, r, NB)
    tl.debug_barrier()  # M takes the place of X
    put_mirrored(R_ptr, QdQ_ptr, U_ptr, H_ptr, X_ptr, r, NB)
    tl.debug_barrier()
    put_Z_and_N(R_ptr, U_ptr, X_ptr, y_ptr, Z_ptr + at, N_ptr + at, r, NB)


def solve(R: Tensor, dR: Tensor, QdQ: Tensor, QV: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Y, Z and N [B, r, r] in ``dtype``, fp32 or fp64, contiguous. R, QdQ = QᵀdQ and QV = QᵀV are fp32, dR of any dtype
    and strides. Scratch: four fp64 [r, r] a matrix."""
    B, r, _ = R.shape
    scratch = torch.empty((B, 4, r, r), dtype=torch.float64, device=R.device)
    Y, Z, N = (torch.empty((B, r, r), dtype=dtype, device=R.device) for _ in range(3))
    NB = block_of(r)
    with on_device_of(R):
        launch(
            solve_kernel, (B,), R.contiguous(), dR, dR.stride(), QdQ, QV, scratch, Y, Z, N, r,
            NB=NB, num_warps=warps_of(NB), num_stages=1,
        )  # fmt: skip
    return Y, Z, N


def _form(columns: int, dR: str, out: str):
    """A launch of ``solve_kernel``; without a basis it returns fp32, beside one fp64."""
    inputs = dict.fromkeys(("R_ptr", "QdQ_ptr", "QV_ptr"), "*fp32")
    outputs = dict.fromkeys(("Y_ptr", "Z_ptr", "N_ptr"), f"*{out}")
    arguments = {
        "dR_ptr": f"*{dR}", "dR_strides": ("i32", "i32", 1), "scratch_ptr": "*fp64", "r": "i32", "NB": columns,
        **inputs, **outputs,
    }  # fmt: skip
    return form(solve_kernel, arguments, num_warps=warps_of(columns), num_stages=1)


COMPILATIONS = [
    _form(16, "fp32", "fp32"),
    _form(16, "fp32", "fp64"),
    _form(32, "fp32", "fp32"),
    _form(64, "fp32", "fp32"),
    _form(64, "fp32", "fp64"),
]
