"""The kernels of ``linear``: one that reads by pointers, one that reads and writes by TMA descriptors.

Both are persistent: each program takes every so-many-th tile. Where nothing drops the rank tiles *follow* the K loop;
inside it, in a branch, they would cost it its multi-buffering. Where a term drops they come *first*, are masked, and
the K loop accumulates on them: masked last, a second accumulator would be alive beside the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...declared import Expects
from .common import dot, kept, load_threshold, load_tile, rounded, store_tile, widened
from .forms import form, tile_for, tiled


def most_ranks(itemsize: int) -> int:
    """Most ranks in one rank tile; exact fp32 matmuls keep a whole step of both operands in registers."""
    return 32 if itemsize == 4 else 64


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
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y [M, N], contiguous, by pointers: operands of any strides. Tuples hold an entry a product, or a term."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
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
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The same by descriptors for a, b and y; one to three products, as arguments of their own because a launch takes
    no descriptors in tuples; None where there is none."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
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


def _form(
    architecture: int,
    dtype: str,
    r: int,
    products: int = 1,
    *,
    dx=False,
    masked=False,
    bias=None,
    base=None,
    tma=False,
    precision="ieee",
    rows=9,
    strided=False,
):
    """A launch of ``linear``: as in forward, or with dx as in backward, where b is not transposed; products of 0 is the
    adapter alone; rows: bucket of M; strided: no stride is 1."""
    terms = max(products, 1)
    K = 4096 if products else 0
    tile = tile_for("linear", architecture, dtype, r, K=K, terms=terms, dropout=masked, tma=tma, bucket=rows)
    block_r = min(max(r, 16), most_ranks(4 if dtype == "fp32" else 2))
    one, seed = "i32" if strided else 1, "*i64" if masked else None
    low = {
        "q_ptrs": f"*{dtype}", "strides_qm": "i32", "strides_qr": 1, "c_ptrs": f"*{dtype}", "strides_cr": "i32",
        "strides_cn": 1, "ranks": "i32", "seed_ptrs": seed, "threshold_ptrs": seed,
    }  # fmt: skip
    arguments = {
        "bias_ptr": bias, "stride_bias": 1 if bias else "i32", "base_ptr": base, "stride_base_m": "i32",
        "stride_base_n": 1 if base else "i32", "M": "i32", "N": "i32", "PRODUCTS": products, "TERMS": terms,
        "RANK_TILES": -(-r // block_r), "HAS_DROPOUT": masked, "PRECISION": precision, "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_R": block_r, "GROUP_M": tile.group_m,
        **{k: (v,) * terms for k, v in low.items()},
    }  # fmt: skip
    once = ("q_ptrs", "c_ptrs")  # a rank tile is one block, or a loop of four: nothing to run ahead of
    if tma:
        b = (tile.block_k, tile.block_n) if dx else (tile.block_n, tile.block_k)
        shapes = {"a": (tile.block_m, tile.block_k), "b": b, "y": (tile.block_m, tile.block_n)}
        described = {name: f"tensordesc<{dtype}{[*shapes[name]]}>" for name in shapes}
        for i, end in enumerate(("", "_1", "_2")):
            there = i < products
            arguments |= {f"{name}_desc{end}": described[name] if there else None for name in "ab"}
            arguments[f"depth{end}"] = "i32" if there else None
        arguments |= {"y_desc": described["y"], "B_TRANSPOSED": not dx}
    else:
        a = f"*{dtype}" if products else None
        of_products = {
            "a_ptrs": a, "strides_am": "i32", "strides_ak": one, "b_ptrs": a,
            "strides_bk": "i32" if dx else one, "strides_bn": one if dx else "i32", "depths": "i32",
        }  # fmt: skip
        arguments |= {k: (v,) * terms for k, v in of_products.items()} | {"y_ptr": base or f"*{dtype}"}
        once += ("a_ptrs", "b_ptrs") if strided else ()  # asynchronous copies move 4 bytes at least
    expects = Expects(wgmma=dtype != "fp32", single_buffered=once, tf32=precision == "tf32")
    return form(linear_tma_kernel if tma else linear_kernel, arguments, **tiled(tile, architecture, expects))


COMPILATIONS = [
    *(
        _form(architecture, dtype, r, products, **flags)
        for architecture in (80, 90)
        for dtype, r, products, flags in (
            ("bf16", 16, 1, {"bias": "*fp32"}),
            ("bf16", 256, 1, {"bias": "*bf16"}),
            ("bf16", 16, 1, {"rows": 0, "bias": "*fp32"}),
            ("bf16", 16, 1, {"strided": True}),
            ("bf16", 16, 1, {"dx": True}),
            ("bf16", 16, 1, {"dx": True, "masked": True}),
            ("bf16", 256, 1, {"dx": True, "masked": True}),
            ("bf16", 16, 1, {"dx": True, "masked": True, "rows": 0}),
            ("bf16", 16, 3, {"dx": True}),
            ("bf16", 16, 3, {"dx": True, "masked": True}),
            ("bf16", 64, 0, {}),
            ("bf16", 16, 0, {"base": "*bf16"}),
            ("bf16", 64, 0, {"base": "*fp32"}),
            ("bf16", 64, 0, {"dx": True, "masked": True}),
            ("fp16", 64, 1, {"bias": "*fp16"}),
            ("fp32", 16, 1, {"bias": "*fp32"}),
            ("fp32", 16, 1, {"precision": "tf32"}),
            ("fp32", 256, 1, {"dx": True, "masked": True}),
            ("fp32", 16, 3, {"dx": True, "masked": True}),
            ("fp32", 64, 0, {"base": "*fp32"}),
        )
    ),
    *(
        _form(90, dtype, r, products, tma=True, **flags)
        for dtype, r, products, flags in (
            ("bf16", 16, 1, {"bias": "*fp32"}),
            ("bf16", 16, 1, {"rows": 0}),
            ("bf16", 64, 1, {"bias": "*bf16"}),
            ("bf16", 256, 1, {}),
            ("bf16", 16, 1, {"dx": True}),
            ("bf16", 64, 1, {"dx": True}),
            ("bf16", 16, 1, {"dx": True, "masked": True}),
            ("bf16", 16, 1, {"dx": True, "masked": True, "rows": 0}),
            ("bf16", 256, 1, {"dx": True, "masked": True}),
            ("bf16", 32, 3, {"dx": True}),
            ("bf16", 64, 3, {"dx": True}),
            ("bf16", 16, 2, {"dx": True, "masked": True}),
            ("bf16", 64, 3, {"dx": True, "masked": True}),
            ("fp16", 16, 1, {"bias": "*fp16"}),
            ("fp32", 16, 1, {"bias": "*fp32"}),
            ("fp32", 16, 1, {"dx": True, "masked": True}),
            ("fp32", 16, 1, {"precision": "tf32"}),
        )
    ),
]
