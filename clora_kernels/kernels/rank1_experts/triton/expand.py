"""``expand``: for the rows of each sample the weighted sum of the rows of the pool that it chose."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...declared import Expects
from ...launch import cdiv, launch
from ...routed_lora.triton.common import dot, load_tile, on_device_of, precision, rounded, store_tile, widened
from ...routed_lora.triton.forms import form
from .shrink import block_of, chosen_rows

BLOCK_M, BLOCK_N = 64, 128
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["L"])
def expand_kernel(
    small_ptr, experts_ptr, stride_ee, stride_en, indices_ptr, base_ptr, stride_bm, stride_bn, y_ptr, L, n, k, blocks_m,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Axis 0: blocks of the rows of each sample, axis 1: blocks of columns; small [G·L, k] fp32, y [G·L, n]."""
    g = tl.program_id(0) // blocks_m
    offs_l = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = g.to(tl.int64) * L + offs_l
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_l < L, offs_n < n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, k, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < k
        rows = chosen_rows(indices_ptr, g, offs_k, k)
        small = load_tile(small_ptr, k, 1, offs_m, offs_k, mask_m, mask_k)  # [BLOCK_M, BLOCK_K]
        experts = load_tile(experts_ptr, stride_ee, stride_en, rows, offs_n, mask_k, mask_n)  # [BLOCK_K, BLOCK_N]
        acc = dot(rounded(small, OPERAND), rounded(experts, OPERAND), acc, PRECISION)  # [BLOCK_M, BLOCK_N]
    if base_ptr is not None:
        acc += widened(load_tile(base_ptr, stride_bm, stride_bn, offs_m, offs_n, mask_m, mask_n))
    store_tile(y_ptr, n, 1, offs_m, offs_n, mask_m, mask_n, acc)


def expand(small: Tensor, experts: Tensor, indices: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """small [G·L, k] in fp32, experts [E, n], indices [G, k], base [G·L, n] → [G·L, n] in ``dtype`` or that of base;
    experts and base of any strides."""
    (G, k), (M, n) = indices.shape, (small.shape[0], experts.shape[1])
    y = torch.empty((M, n), dtype=dtype if base is None else base.dtype, device=small.device)
    if not y.numel():
        return y
    L = M // G
    blocks_m = cdiv(L, BLOCK_M)
    with on_device_of(small):
        launch(
            expand_kernel, (G * blocks_m, cdiv(n, BLOCK_N)),
            small.contiguous(), experts, *experts.stride(), indices.contiguous(), base,
            *((0, 0) if base is None else base.stride()), y, L, n, k, blocks_m,
            OPERAND=_TYPES[dtype], PRECISION=precision(dtype), BLOCK_M=BLOCK_M, BLOCK_K=block_of(k), BLOCK_N=BLOCK_N,
            num_warps=warps_of(dtype == torch.float32, block_of(k)), num_stages=2,
        )  # fmt: skip
    return y


def warps_of(exact: bool, block_k: int) -> int:
    """Warps of a program: of fp32 products many choices take more registers than four have."""
    return 8 if exact and block_k > 32 else 4


def _form(dtype: str, experts: str, block_k: int, base: str | None = None, precision: str = "ieee"):
    operand = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype]
    arguments = {
        "small_ptr": "*fp32", "experts_ptr": f"*{experts}", "stride_ee": "i32", "stride_en": 1, "indices_ptr": "*i64",
        "base_ptr": base and f"*{base}", "stride_bm": "i32", "stride_bn": 1, "y_ptr": f"*{base or dtype}", "L": "i32",
        "n": "i32", "k": "i32", "blocks_m": "i32", "OPERAND": operand, "PRECISION": precision, "BLOCK_M": BLOCK_M,
        "BLOCK_K": block_k, "BLOCK_N": BLOCK_N,
    }  # fmt: skip
    expects = Expects(wgmma=dtype != "fp32", tf32=precision == "tf32", single_buffered=("small_ptr", "experts_ptr"))
    warps = warps_of(dtype == "fp32", block_k)
    return form(expand_kernel, arguments, num_warps=warps, num_stages=2, expects=expects)


COMPILATIONS = [
    _form(dtype, experts, block_k, *options)
    for dtype, experts, block_k, *options in (
        ("bf16", "bf16", 16),
        ("bf16", "bf16", 64, "bf16"),
        ("bf16", "fp32", 16, "fp32"),
        ("fp16", "fp16", 32),
        ("fp32", "fp32", 16, "fp32"),
        ("fp32", "fp32", 64),
        ("fp32", "fp32", 16, None, "tf32"),
    )
]
