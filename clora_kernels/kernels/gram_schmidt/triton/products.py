"""``inner`` and ``combine``: leftᵀ·right and Σ tall·small of batches of tall matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...declared import Expects
from ...launch import cdiv, launch
from ...routed_lora.triton.common import dot, load_tile, on_device_of, store_tile, widened
from ...routed_lora.triton.forms import form
from ..algebra import AGAIN

ROWS = 64  # of a block
SUMMED_ROWS = 32  # of fp32 products: the sum of n equal ones is off by up to n/4 roundings
SPLIT_ROWS = 1024  # of one program; fixed, so that a matrix' bits do not depend on its batch
MOST_COLUMNS = 64  # of a tile

_AGAIN = tl.constexpr(AGAIN)


def warps_of(columns: int) -> int:
    """The warps of a program whose tile has so many columns: more registers than it has would spill."""
    return 8 if columns > 32 else 4


def rows_of(exact: bool) -> int:
    """The rows of one product: few in fp32, as operands of two dtypes are, where the error of sums counts."""
    return SUMMED_ROWS if exact else ROWS


def block_of(columns: int) -> int:
    """The columns of a tile that holds so many, or is the largest."""
    return min(max(1 << (columns - 1).bit_length(), 16), MOST_COLUMNS)


@triton.jit
def goes_again(state_ptr, b):
    """Whether matrix ``b`` takes a second sweep."""
    return tl.load(state_ptr + b) == _AGAIN


@triton.jit(do_not_specialize=["d", "splits"])
def inner_kernel(
    left_ptr, left_strides, right_ptr, right_strides, part_ptr, state_ptr, d, m, n, batch, splits,
    SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Axis 0: splits of each matrix, axis 1: tiles of the product; fp64 sums into parts [splits, batch, m, n]. Where
    there are states, of those matrices alone that go again."""
    b, part = tl.program_id(0) // splits, tl.program_id(0) % splits
    if state_ptr is not None:
        if not goes_again(state_ptr, b):
            return
    tiles_n = tl.cdiv(n, BLOCK_N)
    offs_m = tl.program_id(1) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < m, offs_n < n
    left_ptr += b.to(tl.int64) * left_strides[0]
    right_ptr += b.to(tl.int64) * right_strides[0]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    first = part * SPLIT
    for row in range(first, tl.minimum(first + SPLIT, d), BLOCK_D):
        offs_d = row + tl.arange(0, BLOCK_D)
        mask_d = offs_d < d
        left = load_tile(left_ptr, left_strides[2], left_strides[1], offs_m, offs_d, mask_m, mask_d)
        right = load_tile(right_ptr, right_strides[1], right_strides[2], offs_d, offs_n, mask_d, mask_n)
        if left.dtype != right.dtype:
            left, right = widened(left), widened(right)
        acc += dot(left, right, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), "ieee").to(tl.float64)
    part_ptr += (part.to(tl.int64) * batch + b) * m * n
    store_tile(part_ptr, n, 1, offs_m, offs_n, mask_m, mask_n, acc)


@triton.jit(do_not_specialize=["splits"])
def inner_sums_kernel(parts_ptr, splits, out_ptr, size, BLOCK: tl.constexpr):
    """out [size] = Σ parts [splits, size], in their order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float64)
    for _ in range(splits):
        acc += tl.load(parts_ptr + offs, mask=offs < size, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < size)


def inner_parts(left: Tensor, right: Tensor, parts: Tensor | None = None, state: Tensor | None = None) -> Tensor:
    """leftᵀ·right of [B, d, m] and [B, d, n], any strides, in fp64 parts [splits, B, m, n], one for every
    ``SPLIT_ROWS`` rows, into ``parts`` if they are given. Sums are fp32 over ``rows_of`` rows and fp64 over those."""
    (B, d, m), n = left.shape, right.shape[2]
    splits, block_m, block_n = max(cdiv(d, SPLIT_ROWS), 1), block_of(m), block_of(n)
    rows = rows_of(left.dtype != right.dtype or left.dtype == torch.float32)
    if parts is None:
        parts = torch.empty((splits, B, m, n), dtype=torch.float64, device=left.device)
    launch(
        inner_kernel, (B * splits, cdiv(m, block_m) * cdiv(n, block_n)),
        left, left.stride(), right, right.stride(), parts, state, d, m, n, B, splits,
        SPLIT=SPLIT_ROWS, BLOCK_D=rows, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=warps_of(max(block_m, block_n)), num_stages=2,
    )  # fmt: skip
    return parts


def inner(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ·right [B, m, n] in fp32, of sums as in ``inner_parts``."""
    out = torch.empty((left.shape[0], left.shape[2], right.shape[2]), dtype=torch.float32, device=left.device)
    if out.numel():
        with on_device_of(left):
            parts = inner_parts(left, right)
            launch(inner_sums_kernel, (cdiv(out.numel(), 1024),), parts, len(parts), out, out.numel(), BLOCK=1024)
    return out


@triton.jit(do_not_specialize=["d"])
def combine_kernel(
    tall_ptrs, strides_tb, strides_td, strides_tc, small_ptrs, counts, out_ptr, out_strides, swept_ptr, state_ptr,
    d, n, blocks_d, TERMS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SECOND: tl.constexpr,
):  # fmt: skip
    """Axis 0: blocks of rows of each matrix, axis 1: blocks of its columns. Tuples hold one entry a term. Of matrices
    that go again ``swept`` [batch, d, n] gets the sum too, in fp32; in the SECOND sweep it is made of those alone."""
    b = tl.program_id(0) // blocks_d
    if SECOND:
        if not goes_again(state_ptr, b):
            return
    b = b.to(tl.int64)
    offs_d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_d, mask_n = offs_d < d, offs_n < n
    acc = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    for j in tl.static_range(TERMS):
        tall_ptr = tall_ptrs[j] + b * strides_tb[j]
        small_ptr = small_ptrs[j] + b * counts[j] * n
        for k in range(0, counts[j], BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < counts[j]
            tall = load_tile(tall_ptr, strides_td[j], strides_tc[j], offs_d, offs_k, mask_d, mask_k)
            small = load_tile(small_ptr, n, 1, offs_k, offs_n, mask_k, mask_n)
            acc = dot(widened(tall), small, acc, "ieee")
    if SECOND:
        tl.debug_barrier()  # rows of Q are read whole before they are written
    store_tile(out_ptr + b * out_strides[0], out_strides[1], out_strides[2], offs_d, offs_n, mask_d, mask_n, acc)
    if swept_ptr is not None:
        if goes_again(state_ptr, b):
            store_tile(swept_ptr + b * d * n, n, 1, offs_d, offs_n, mask_d, mask_n, acc)


def combine_into(
    out: Tensor,
    terms: Sequence[tuple[Tensor, Tensor]],
    state: Tensor | None = None,
    swept: Tensor | None = None,
    second: bool = False,
) -> None:
    """out [B, d, n] = Σ tall [B, d, c]·small [B, c, n], fp32 sums rounded once; any strides but of ``small``, which is
    fp32 and contiguous. Four terms are the most there are. ``state``, ``swept`` and ``second`` as of the kernel."""
    B, d, n = out.shape
    talls, smalls = zip(*terms, strict=True)
    block_n, block_k, blocks_d = block_of(n), 16 if n <= 16 else 32, cdiv(d, ROWS)
    launch(
        combine_kernel, (B * blocks_d, cdiv(n, block_n)),
        talls, *zip(*(t.stride() for t in talls), strict=True), tuple(t.contiguous() for t in smalls),
        tuple(t.shape[2] for t in talls), out, out.stride(), swept, state, d, n, blocks_d,
        TERMS=len(terms), BLOCK_D=ROWS, BLOCK_N=block_n, BLOCK_K=block_k, SECOND=second,
        num_warps=warps_of(block_n), num_stages=2,
    )  # fmt: skip


def combine(terms: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """Σ tall·small [B, d, n] in ``dtype``, contiguous."""
    tall, small = terms[0]
    out = torch.empty((*tall.shape[:2], small.shape[2]), dtype=dtype, device=tall.device)
    if out.numel():
        with on_device_of(out):
            combine_into(out, terms)
    return out


def _inner_form(left: str, right: str, columns: int, again: bool):
    """A launch of ``inner_kernel``; 16-bit tiles of fewer than 64 rows and fp32 need no warp-group instructions."""
    arguments = {
        "left_ptr": f"*{left}", "left_strides": ("i32", "i32", 1), "right_ptr": f"*{right}",
        "right_strides": ("i32", "i32", 1), "part_ptr": "*fp64", "state_ptr": "*i32" if again else None, "d": "i32",
        "m": "i32", "n": "i32", "batch": "i32", "splits": "i32", "SPLIT": SPLIT_ROWS,
        "BLOCK_D": rows_of("fp32" in (left, right)), "BLOCK_M": columns, "BLOCK_N": columns,
    }  # fmt: skip
    single = ("left_ptr", "right_ptr")  # operands are transposed or widened in registers
    return form(
        inner_kernel,
        arguments,
        num_warps=warps_of(columns),
        num_stages=2,
        expects=Expects(wgmma=False, single_buffered=single),
    )


def _combine_form(talls: tuple[str, ...], out: str, columns: int, sweep: str = ""):
    """A launch of ``combine_kernel`` in backward, in a "first" sweep, one that also writes "swept", or a "second"."""
    count = len(talls)
    arguments = {
        "tall_ptrs": tuple(f"*{tall}" for tall in talls), "strides_tb": ("i32",) * count,
        "strides_td": ("i32",) * count, "strides_tc": (1,) * count,
        "small_ptrs": ("*fp32",) * count, "counts": ("i32",) * count, "out_ptr": f"*{out}",
        "out_strides": ("i32", "i32", 1), "swept_ptr": "*fp32" if sweep == "swept" else None,
        "state_ptr": "*i32" if sweep else None, "d": "i32", "n": "i32", "blocks_d": "i32", "TERMS": count,
        "BLOCK_D": ROWS, "BLOCK_N": columns, "BLOCK_K": 16 if columns == 16 else 32, "SECOND": sweep == "second",
    }  # fmt: skip
    single = ("tall_ptrs", "small_ptrs")
    return form(
        combine_kernel,
        arguments,
        num_warps=warps_of(columns),
        num_stages=2,
        expects=Expects(wgmma=False, single_buffered=single),
    )


COMPILATIONS = [
    *(
        _inner_form(*arguments)
        for arguments in (
            ("fp32", "fp32", 16, False),
            ("fp32", "fp32", 64, True),
            ("bf16", "bf16", 16, False),
            ("bf16", "bf16", 64, False),
            ("fp16", "fp16", 16, False),
            ("fp32", "bf16", 16, False),
            ("fp32", "bf16", 64, True),
        )
    ),
    form(inner_sums_kernel, {"parts_ptr": "*fp64", "splits": "i32", "out_ptr": "*fp32", "size": "i32", "BLOCK": 1024}),
    *(
        _combine_form(*arguments)
        for arguments in (
            (("fp32",), "fp32", 64, "first"),
            (("fp32",), "fp32", 64, "swept"),
            (("fp32",), "fp32", 64, "second"),
            (("bf16",), "bf16", 16, "swept"),
            (("fp16",), "fp16", 16, "swept"),
            (("fp32",), "bf16", 16, "second"),
            (("fp32", "fp32"), "fp32", 64, "second"),
            (("bf16", "fp32"), "bf16", 16, "swept"),
            (("fp32", "fp32"), "bf16", 16, "second"),
            (("fp32", "fp32", "fp32"), "fp32", 16),
            (("bf16", "bf16", "bf16"), "bf16", 64),
            (("bf16", "bf16", "bf16", "fp32"), "bf16", 16),
            (("fp32", "fp32", "fp32", "fp32"), "fp32", 64),
            (("bf16", "bf16", "bf16", "fp32"), "fp32", 16),
        )
    ),
]
