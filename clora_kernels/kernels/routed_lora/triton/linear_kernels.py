"""The kernels of ``linear``: one that reads by pointers, one that reads and writes by TMA descriptors.

Both are persistent: each program takes every so-many-th tile. Where nothing drops the rank tiles *follow* the K loop;
inside it, in a branch, they would cost it its multi-buffering. Where a term drops they come *first*, are masked, and the
K loop accumulates on them: masked last, a second accumulator would be alive beside the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, kept, load_threshold, load_tile, rounded, store_tile, widened


@triton.jit
def place_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of the i-th tile: column by column within groups of GROUP_M rows, so that a group's a and b stay in
    the cache."""
    per_group = GROUP_M * tiles_n
    first = tile // per_group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % per_group % rows, tile % per_group // rows


@triton.jit
def add_low_rank(
    acc, q_ptrs, strides_qm, strides_qr, c_ptrs, strides_cr, strides_cn, ranks, seed_ptrs, threshold_ptrs,
    offs_m, offs_n, first_n, M, N, TERMS: tl.constexpr, RANK_TILES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + Σ mask ⊙ (q·C) over the terms; a term without a mask accumulates directly."""
    mask_m, mask_n = offs_m < M, offs_n < N
    for j in tl.static_range(TERMS):
        if seed_ptrs[j] is None:
            term = acc
        else:
            term = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.range(RANK_TILES, num_stages=1):
            offs_r = i * BLOCK_R + tl.arange(0, BLOCK_R)
            mask_r = offs_r < ranks[j]
            q = load_tile(q_ptrs[j], strides_qm[j], strides_qr[j], offs_m, offs_r, mask_m, mask_r)  # [BLOCK_M, BLOCK_R]
            c = load_tile(c_ptrs[j], strides_cr[j], strides_cn[j], offs_r, offs_n, mask_r, mask_n)  # [BLOCK_R, BLOCK_N]
            term = dot(q, c, term, PRECISION)
        if seed_ptrs[j] is None:
            acc = term
        else:
            seed, threshold = tl.load(seed_ptrs[j]), load_threshold(threshold_ptrs[j])
            keep = kept(seed, threshold, offs_m, first_n, N, BLOCK_M, BLOCK_N)
            acc = tl.where(keep, term, 0.0) if j == 0 else acc + tl.where(keep, term, 0.0)  # acc holds nothing yet
    return acc


@triton.jit
def add_outer(
    acc, bias_ptr, stride_bias, base_ptr, stride_base_m, stride_base_n, offs_m, offs_n, M, N
):  # fmt: skip
    """acc + bias + base_output, each where it is there."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n.to(tl.int64) * stride_bias, mask=offs_n < N, other=0.0)  # [BLOCK_N]
        acc += widened(bias)[None, :]
    if base_ptr is not None:
        base = load_tile(base_ptr, stride_base_m, stride_base_n, offs_m, offs_n, offs_m < M, offs_n < N)
        if base.dtype == tl.float64:
            acc = acc + base  # [BLOCK_M, BLOCK_N], y is fp64 too
        else:
            acc += widened(base)
    return acc


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    a_ptrs, strides_am, strides_ak, b_ptrs, strides_bk, strides_bn, depths,
    q_ptrs, strides_qm, strides_qr, c_ptrs, strides_cr, strides_cn, ranks, seed_ptrs, threshold_ptrs,
    bias_ptr, stride_bias, base_ptr, stride_base_m, stride_base_n, y_ptr, M, N,
    PRODUCTS: tl.constexpr, TERMS: tl.constexpr, RANK_TILES: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """y [M, N], contiguous, by pointers: operands of any strides. Tuples hold an entry a product, or a term."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = place_of(tile, tiles_m, tiles_n, GROUP_M)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_DROPOUT:
            acc = add_low_rank(
                acc, q_ptrs, strides_qm, strides_qr, c_ptrs, strides_cr, strides_cn, ranks, seed_ptrs, threshold_ptrs,
                offs_m, offs_n, pid_n * BLOCK_N, M, N, TERMS, RANK_TILES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        for i in tl.static_range(PRODUCTS):
            for k in range(0, depths[i], BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                mask_k = offs_k < depths[i]
                a = load_tile(a_ptrs[i], strides_am[i], strides_ak[i], offs_m, offs_k, offs_m < M, mask_k)
                b = load_tile(b_ptrs[i], strides_bk[i], strides_bn[i], offs_k, offs_n, mask_k, offs_n < N)
                acc = dot(a, b, acc, PRECISION)  # [BLOCK_M, BLOCK_K]·[BLOCK_K, BLOCK_N]
        if not HAS_DROPOUT:
            acc = add_low_rank(
                acc, q_ptrs, strides_qm, strides_qr, c_ptrs, strides_cr, strides_cn, ranks, seed_ptrs, threshold_ptrs,
                offs_m, offs_n, pid_n * BLOCK_N, M, N, TERMS, RANK_TILES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        acc = add_outer(acc, bias_ptr, stride_bias, base_ptr, stride_base_m, stride_base_n, offs_m, offs_n, M, N)
        store_tile(y_ptr, N, 1, offs_m, offs_n, offs_m < M, offs_n < N, acc)


@triton.jit
def add_product(
    acc, a_desc, b_desc, depth, row, column, B_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + a·b for the tile at (row, column); what lies outside a tensor is read as 0."""
    for k in range(0, depth, BLOCK_K):
        a = a_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
        b = b_desc.load([column, k]).T if B_TRANSPOSED else b_desc.load([k, column])  # [BLOCK_K, BLOCK_N]
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M"])
def linear_tma_kernel(
    a_desc, b_desc, a_desc_1, b_desc_1, a_desc_2, b_desc_2, y_desc, depth, depth_1, depth_2,
    q_ptrs, strides_qm, strides_qr, c_ptrs, strides_cr, strides_cn, ranks, seed_ptrs, threshold_ptrs,
    bias_ptr, stride_bias, base_ptr, stride_base_m, stride_base_n, M, N,
    PRODUCTS: tl.constexpr, B_TRANSPOSED: tl.constexpr, TERMS: tl.constexpr, RANK_TILES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """The same by descriptors for a, b and y; one to three products, as arguments of their own because a launch takes
    no descriptors in tuples."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = place_of(tile, tiles_m, tiles_n, GROUP_M)
        row, column = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = column + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_DROPOUT:
            acc = add_low_rank(
                acc, q_ptrs, strides_qm, strides_qr, c_ptrs, strides_cr, strides_cn, ranks, seed_ptrs, threshold_ptrs,
                offs_m, offs_n, column, M, N, TERMS, RANK_TILES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        acc = add_product(acc, a_desc, b_desc, depth, row, column, B_TRANSPOSED, PRECISION, BLOCK_K)
        if PRODUCTS > 1:
            acc = add_product(acc, a_desc_1, b_desc_1, depth_1, row, column, B_TRANSPOSED, PRECISION, BLOCK_K)
        if PRODUCTS > 2:
            acc = add_product(acc, a_desc_2, b_desc_2, depth_2, row, column, B_TRANSPOSED, PRECISION, BLOCK_K)
        if not HAS_DROPOUT:
            acc = add_low_rank(
                acc, q_ptrs, strides_qm, strides_qr, c_ptrs, strides_cr, strides_cn, ranks, seed_ptrs, threshold_ptrs,
                offs_m, offs_n, column, M, N, TERMS, RANK_TILES, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        acc = add_outer(acc, bias_ptr, stride_bias, base_ptr, stride_base_m, stride_base_n, offs_m, offs_n, M, N)
        y_desc.store([row, column], rounded(acc, y_desc.dtype))
