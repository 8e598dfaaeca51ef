"""``reduce``: for each expert the weighted sum of the rows of the samples that chose it.

Two launches: smallᵀ·big of each sample, [k, n] in fp32 as scratch, one read of the rows; then, for each expert, the sum
of what its choosers left there, in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...declared import Expects
from ...launch import cdiv, launch
from ...routed_lora.triton.common import dot, load_tile, on_device_of, precision, rounded, store_tile
from ...routed_lora.triton.forms import form
from ..algebra import Order
from .shrink import block_of

BLOCK_L, BLOCK_N = 64, 128
SUM_BLOCK = 512


@triton.jit(do_not_specialize=["L"])
def products_kernel(
    small_ptr, big_ptr, stride_bm, stride_bn, out_ptr, L, n, k,
    PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Axis 0: samples, axis 1: blocks of columns, axis 2: blocks of the choice; out [G, k, n] fp32."""
    g = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < n, offs_k < k
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for first in range(0, L, BLOCK_L):
        offs_l = first + tl.arange(0, BLOCK_L)
        offs_m, mask_l = g * L + offs_l, offs_l < L
        big = load_tile(big_ptr, stride_bm, stride_bn, offs_m, offs_n, mask_l, mask_n)  # [BLOCK_L, BLOCK_N]
        small = load_tile(small_ptr, 1, k, offs_k, offs_m, mask_k, mask_l)  # [BLOCK_K, BLOCK_L]
        acc = dot(rounded(small, big.dtype), big, acc, PRECISION)  # [BLOCK_K, BLOCK_N]
    store_tile(out_ptr + g * k * n, n, 1, offs_k, offs_n, mask_k, mask_n, acc)


@triton.jit
def sums_kernel(products_ptr, order_ptr, starts_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Axis 0: experts, axis 1: blocks of columns; out [E, n]."""
    e = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(starts_ptr + e), tl.load(starts_ptr + e + 1)):
        row = tl.load(order_ptr + i).to(tl.int64)
        acc += tl.load(products_ptr + row * n + offs, mask=mask, other=0.0)  # [BLOCK]
    tl.store(out_ptr + e * n + offs, rounded(acc, out_ptr.dtype.element_ty), mask=mask)


def order(indices: Tensor, experts: int) -> Order:
    """By a stable sort on the device."""
    chosen, places = torch.sort(indices.reshape(-1), stable=True)
    bounds = torch.arange(experts + 1, dtype=chosen.dtype, device=indices.device)
    return Order(places, torch.searchsorted(chosen, bounds))


def reduce(small: Tensor, big: Tensor, indices: Tensor, order: Order, experts: Tensor) -> Tensor:
    """small [G·L, k] in fp32, big [G·L, n] of any strides → [E, n] in the dtype of ``experts``. Scratch: 4·G·k·n
    bytes."""
    (G, k), (M, n), E = indices.shape, big.shape, experts.shape[0]
    if not M or not n:
        return torch.zeros((E, n), dtype=experts.dtype, device=big.device)
    out = torch.empty((E, n), dtype=experts.dtype, device=big.device)
    products = torch.empty((G, k, n), dtype=torch.float32, device=big.device)
    block_k = block_of(k)
    with on_device_of(big):
        launch(
            products_kernel, (G, cdiv(n, BLOCK_N), cdiv(k, block_k)),
            small.contiguous(), big, *big.stride(), products, M // G, n, k,
            PRECISION=precision(big.dtype), BLOCK_L=BLOCK_L, BLOCK_K=block_k, BLOCK_N=BLOCK_N,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        launch(sums_kernel, (E, cdiv(n, SUM_BLOCK)), products, *order, out, n, BLOCK=SUM_BLOCK, num_warps=4)
    return out


def _form(dtype: str, block_k: int, precision: str = "ieee"):
    arguments = {
        "small_ptr": "*fp32", "big_ptr": f"*{dtype}", "stride_bm": "i32", "stride_bn": 1, "out_ptr": "*fp32",
        "L": "i32", "n": "i32", "k": "i32", "PRECISION": precision, "BLOCK_L": BLOCK_L, "BLOCK_K": block_k,
        "BLOCK_N": BLOCK_N,
    }  # fmt: skip
    # a choice of 16 to 64 is less than the 64 rows of wgmma
    expects = Expects(wgmma=False, tf32=precision == "tf32", single_buffered=("small_ptr",))
    return form(products_kernel, arguments, num_warps=4, num_stages=3, expects=expects)


def _sums_form(dtype: str):
    arguments = {
        "products_ptr": "*fp32", "order_ptr": "*i64", "starts_ptr": "*i64", "out_ptr": f"*{dtype}", "n": "i32",
        "BLOCK": SUM_BLOCK,
    }  # fmt: skip
    return form(sums_kernel, arguments)


COMPILATIONS = [
    *(_form(*options) for options in (("bf16", 16), ("bf16", 64), ("fp16", 32), ("fp32", 16), ("fp32", 64))),
    _form("fp32", 16, "tf32"),
    *map(_sums_form, ("bf16", "fp32")),
]
