"""Small fp64 matrices: blocks of ``NB`` columns in registers, all else in memory, which a program's threads share."""

from __future__ import annotations

import triton
import triton.language as tl

from ...routed_lora.triton.common import load_tile, store_tile


@triton.jit
def offsets(block, r, NB: tl.constexpr):
    """Indices of a block of columns, and which are there."""
    offs = block * NB + tl.arange(0, NB)
    return offs, offs < r


@triton.jit
def block_at(ptr, ld, i, j, r, NB: tl.constexpr):
    """Block (i, j) of a matrix [r, ld], 0 outside."""
    rows, mask_rows = offsets(i, r, NB)
    columns, mask_columns = offsets(j, r, NB)
    return load_tile(ptr, ld, 1, rows, columns, mask_rows, mask_columns)


@triton.jit
def put_block(ptr, ld, i, j, r, value, NB: tl.constexpr):
    rows, mask_rows = offsets(i, r, NB)
    columns, mask_columns = offsets(j, r, NB)
    store_tile(ptr, ld, 1, rows, columns, mask_rows, mask_columns, value)


@triton.jit
def product(acc, left_ptr, left_row, left_step, rows, mask_rows, right_ptr, ld, columns, mask_columns, begin, end):
    """acc + Σ_l left[row, l]·right[l, column] for l from ``begin`` to ``end``."""
    for step in range(begin, end):
        left = tl.load(left_ptr + rows * left_row + step * left_step, mask=mask_rows, other=0.0)
        right = tl.load(right_ptr + step * ld + columns, mask=mask_columns, other=0.0)
        acc += left.to(tl.float64)[:, None] * right.to(tl.float64)[None, :]
    return acc


@triton.jit
def cholesky_of_block(A, NB: tl.constexpr):
    """Upper R with RᵀR = A [NB, NB], and the least pivot, which says whether it is one."""
    offs = tl.arange(0, NB)
    rows = offs[:, None]
    least = tl.full((), 1.0, tl.float64)
    for j in range(NB):
        row = tl.sum(tl.where(rows == j, A, 0.0), axis=0)
        pivot = tl.sum(tl.where(offs == j, row, 0.0), axis=0)
        least = tl.minimum(least, tl.where(pivot > 0, pivot, -1.0))  # of NaN too
        row = tl.where(offs >= j, row / tl.sqrt(tl.where(pivot > 0, pivot, 1.0)), 0.0)
        A = tl.where(rows == j, row[None, :], tl.where(rows > j, A - row[:, None] * row[None, :], A))
    return A, least


@triton.jit
def inverse_of_block(R, NB: tl.constexpr):
    """R⁻¹ of an upper triangular R [NB, NB]."""
    offs = tl.arange(0, NB)
    rows = offs[:, None]
    X = tl.zeros((NB, NB), tl.float64)
    for step in range(NB):
        i = NB - 1 - step
        row = tl.sum(tl.where(rows == i, R, 0.0), axis=0)
        pivot = tl.sum(tl.where(offs == i, row, 0.0), axis=0)
        inside = tl.sum(tl.where(offs > i, row, 0.0)[:, None] * X, axis=0)
        X = tl.where(rows == i, ((tl.where(offs == i, 1.0, 0.0) - inside) / pivot)[None, :], X)
    return X


@triton.jit
def unit_columns(G_ptr, S_ptr, A_ptr, norms_ptr, k, r, NB: tl.constexpr):
    """A = G − SᵀS on columns of unit norm, in its upper blocks; Frobenius norm of the unit G, squared."""
    total = tl.full((), 0.0, tl.float64)
    blocks = tl.cdiv(r, NB)
    for i in range(blocks):
        rows, mask_rows = offsets(i, r, NB)
        of_rows = 1.0 / tl.load(norms_ptr + rows, mask=mask_rows, other=1.0)
        for j in range(i, blocks):
            columns, mask_columns = offsets(j, r, NB)
            scale = of_rows[:, None] / tl.load(norms_ptr + columns, mask=mask_columns, other=1.0)[None, :]
            tile = block_at(G_ptr, r, i, j, r, NB)
            total += tl.where(i == j, 1.0, 2.0) * tl.sum(tl.sum(tile * scale * tile * scale, axis=1), axis=0)
            if S_ptr is not None:
                zeros = tl.zeros((NB, NB), tl.float64)
                tile -= product(zeros, S_ptr, 1, r, rows, mask_rows, S_ptr, r, columns, mask_columns, 0, k)
            put_block(A_ptr, r, i, j, r, tile * scale, NB)
    return total


@triton.jit
def cholesky(A_ptr, X_ptr, r, NB: tl.constexpr):
    """A becomes R with RᵀR = A, the diagonal blocks of X their inverses; the least pivot."""
    blocks = tl.cdiv(r, NB)
    offs = tl.arange(0, NB)
    least = tl.full((), 1.0, tl.float64)
    for b in range(blocks):
        padding = (offs[:, None] == offs[None, :]) & (b * NB + offs >= r)[None, :]
        D, pivot = cholesky_of_block(block_at(A_ptr, r, b, b, r, NB) + tl.where(padding, 1.0, 0.0), NB)
        least = tl.minimum(least, pivot)
        put_block(A_ptr, r, b, b, r, D, NB)
        put_block(X_ptr, r, b, b, r, inverse_of_block(D, NB), NB)
        tl.debug_barrier()
        rows, mask_rows = offsets(b, r, NB)
        first, last = b * NB, tl.minimum(b * NB + NB, r)
        for j in range(b + 1, blocks):
            columns, mask_columns = offsets(j, r, NB)
            tile = tl.zeros((NB, NB), tl.float64)
            tile = product(tile, X_ptr, 1, r, rows, mask_rows, A_ptr, r, columns, mask_columns, first, last)
            tl.debug_barrier()  # the block is read whole before it is written
            put_block(A_ptr, r, b, j, r, tile, NB)
        tl.debug_barrier()
        for i in range(b + 1, blocks):
            rows, mask_rows = offsets(i, r, NB)
            for j in range(i, blocks):
                columns, mask_columns = offsets(j, r, NB)
                tile = tl.zeros((NB, NB), tl.float64)
                tile = product(tile, A_ptr, 1, r, rows, mask_rows, A_ptr, r, columns, mask_columns, first, last)
                put_block(A_ptr, r, i, j, r, block_at(A_ptr, r, i, j, r, NB) - tile, NB)
        tl.debug_barrier()
    return least


@triton.jit
def invert(R_ptr, X_ptr, r, NB: tl.constexpr):
    """X = R⁻¹, of which the diagonal blocks are there."""
    blocks = tl.cdiv(r, NB)
    for j in range(1, blocks):
        columns, mask_columns = offsets(j, r, NB)
        end = tl.minimum(j * NB + NB, r)
        for step in range(j):
            i = j - 1 - step
            rows, mask_rows = offsets(i, r, NB)
            zeros = tl.zeros((NB, NB), tl.float64)
            tile = product(zeros, R_ptr, r, 1, rows, mask_rows, X_ptr, r, columns, mask_columns, i * NB + NB, end)
            put_block(X_ptr, r, i, j, r, tile, NB)
            tl.debug_barrier()
            tile = product(zeros, X_ptr, r, 1, rows, mask_rows, X_ptr, r, columns, mask_columns, i * NB, i * NB + NB)
            tl.debug_barrier()
            put_block(X_ptr, r, i, j, r, -tile, NB)
            tl.debug_barrier()
