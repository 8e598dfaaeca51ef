"""``shrink``: the rows of each sample times the rows of the pool that it chose."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...declared import Expects
from ...launch import cdiv, launch
from ...routed_lora.tiles import block_of_rank
from ...routed_lora.triton.common import dot, load_tile, on_device_of, precision, rounded, store_tile
from ...routed_lora.triton.forms import form

BLOCK_M, BLOCK_N = 64, 64
MOST_CHOICES = 64  # of one program: more have programs of their own, which read the rows again


@triton.jit
def chosen_rows(indices_ptr, g, offs_k, k):
    """The experts [BLOCK_K] that sample ``g`` chose; 0 beyond its choice."""
    return tl.load(indices_ptr + g.to(tl.int64) * k + offs_k, mask=offs_k < k, other=0)


@triton.jit(do_not_specialize=["L"])
def shrink_kernel(
    big_ptr, stride_bm, stride_bn, experts_ptr, stride_ee, stride_en, indices_ptr, out_ptr, L, n, k, blocks_m,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Axis 0: blocks of the rows of each sample, axis 1: blocks of its choice; out [G·L, k] fp32."""
    g = tl.program_id(0) // blocks_m
    offs_l = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = g.to(tl.int64) * L + offs_l
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m, mask_k = offs_l < L, offs_k < k
    rows = chosen_rows(indices_ptr, g, offs_k, k)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first in range(0, n, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n
        big = load_tile(big_ptr, stride_bm, stride_bn, offs_m, offs_n, mask_m, mask_n)  # [BLOCK_M, BLOCK_N]
        experts = load_tile(experts_ptr, stride_en, stride_ee, offs_n, rows, mask_n, mask_k)  # [BLOCK_N, BLOCK_K]
        acc = dot(big, rounded(experts, big.dtype), acc, PRECISION)  # [BLOCK_M, BLOCK_K]
    store_tile(out_ptr, k, 1, offs_m, offs_k, mask_m, mask_k, acc)


def block_of(k: int) -> int:
    """The choices of a program."""
    return min(block_of_rank(k), MOST_CHOICES)


def shrink(big: Tensor, experts: Tensor, indices: Tensor) -> Tensor:
    """big [G·L, n], experts [E, n], any strides, indices [G, k] → [G·L, k] in fp32."""
    (G, k), (M, n) = indices.shape, big.shape
    out = torch.empty((M, k), dtype=torch.float32, device=big.device)
    if not M:
        return out
    L, block_k = M // G, block_of(k)
    blocks_m = cdiv(L, BLOCK_M)
    with on_device_of(big):
        launch(
            shrink_kernel, (G * blocks_m, cdiv(k, block_k)),
            big, *big.stride(), experts, *experts.stride(), indices.contiguous(), out, L, n, k, blocks_m,
            PRECISION=precision(big.dtype), BLOCK_M=BLOCK_M, BLOCK_K=block_k, BLOCK_N=BLOCK_N,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out


def _form(dtype: str, experts: str, block_k: int, precision: str = "ieee"):
    arguments = {
        "big_ptr": f"*{dtype}", "stride_bm": "i32", "stride_bn": 1, "experts_ptr": f"*{experts}", "stride_ee": "i32",
        "stride_en": 1, "indices_ptr": "*i64", "out_ptr": "*fp32", "L": "i32", "n": "i32", "k": "i32",
        "blocks_m": "i32", "PRECISION": precision, "BLOCK_M": BLOCK_M, "BLOCK_K": block_k, "BLOCK_N": BLOCK_N,
    }  # fmt: skip
    expects = Expects(wgmma=dtype != "fp32", tf32=precision == "tf32")
    return form(shrink_kernel, arguments, num_warps=4, num_stages=3, expects=expects)


COMPILATIONS = [
    _form(dtype, experts, block_k, *precision)
    for dtype, experts, block_k, *precision in (
        ("bf16", "bf16", 16),
        ("bf16", "bf16", 64),
        ("bf16", "fp32", 16),
        ("fp16", "fp16", 32),
        ("fp32", "fp32", 16),
        ("fp32", "fp32", 64),
        ("fp32", "fp32", 16, "tf32"),
    )
]
