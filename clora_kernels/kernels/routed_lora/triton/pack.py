"""``pack``: the small operands, A [r, K] and C = s·(R_frozen + R)·B [r, N], in fp32, rounded once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...declared import Expects
from ...launch import cdiv, launch
from ..algebra import Packed, Projection
from .common import block_of_rank, dot, load_tile, number, number_for, on_device_of, store_tile, widened
from .forms import form

BLOCK = 64
"""Columns a program works on, and steps of the sum over N of dR."""

BLOCK_OF_RANKS = 32
"""Ranks a program works on at a time: exact fp32 matmuls keep a whole step of both operands in registers."""


@triton.jit
def load_routing(
    routing_ptr, stride_ti, stride_tj, frozen_ptr, stride_fi, stride_fj, offs_i, offs_j, mask_i, mask_j,
    IDENTITY: tl.constexpr, FROZEN: tl.constexpr,
):  # fmt: skip
    """(R_frozen + R, R) [i, j] in fp32; the identity where there is no routing."""
    if IDENTITY:
        live = (offs_i[:, None] == offs_j[None, :]).to(tl.float32)
    else:
        live = widened(load_tile(routing_ptr, stride_ti, stride_tj, offs_i, offs_j, mask_i, mask_j))
    total = live
    if FROZEN:
        total += widened(load_tile(frozen_ptr, stride_fi, stride_fj, offs_i, offs_j, mask_i, mask_j))
    return total, live


@triton.jit
def pack_kernel(
    lora_A_ptr, stride_ar, stride_ak, lora_B_ptr, stride_bn, stride_br,
    routing_ptr, stride_ti, stride_tj, frozen_ptr, stride_fi, stride_fj, scaling,
    A_ptr, stride_pr, C_ptr, stride_cr, live_ptr, stride_lr, N, K, r, tiles_of_A,
    WANT_C: tl.constexpr, WANT_LIVE: tl.constexpr, IDENTITY: tl.constexpr, FROZEN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The first ``tiles_of_A`` programs write A [r, K], the others C and C_live [r, N]; axis 1: blocks of ranks."""
    pid = tl.program_id(0)
    offs_i = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_i = offs_i < r
    if pid < tiles_of_A:
        offs_k = pid * BLOCK + tl.arange(0, BLOCK)
        a = load_tile(lora_A_ptr, stride_ar, stride_ak, offs_i, offs_k, mask_i, offs_k < K)  # [BLOCK_R, BLOCK]
        store_tile(A_ptr, stride_pr, 1, offs_i, offs_k, mask_i, offs_k < K, a)
    else:
        offs_n = (pid - tiles_of_A) * BLOCK + tl.arange(0, BLOCK)
        mask_n = offs_n < N
        s = number(scaling)
        if IDENTITY:
            b = load_tile(lora_B_ptr, stride_br, stride_bn, offs_i, offs_n, mask_i, mask_n)  # [BLOCK_R, BLOCK]
            store_tile(C_ptr, stride_cr, 1, offs_i, offs_n, mask_i, mask_n, widened(b) * s)
        else:
            C = tl.zeros((BLOCK_R, BLOCK), tl.float32)
            C_live = tl.zeros((BLOCK_R, BLOCK), tl.float32)
            for j in range(0, r, BLOCK_R):
                offs_j = j + tl.arange(0, BLOCK_R)
                mask_j = offs_j < r
                total, live = load_routing(
                    routing_ptr, stride_ti, stride_tj, frozen_ptr, stride_fi, stride_fj,
                    offs_i, offs_j, mask_i, mask_j, False, FROZEN,
                )  # fmt: skip
                b = widened(load_tile(lora_B_ptr, stride_br, stride_bn, offs_j, offs_n, mask_j, mask_n))
                if WANT_C:
                    C = dot(total, b, C, "ieee")  # [BLOCK_R, BLOCK_R]·[BLOCK_R, BLOCK]
                if WANT_LIVE:
                    C_live = dot(live, b, C_live, "ieee")
            if WANT_C:
                store_tile(C_ptr, stride_cr, 1, offs_i, offs_n, mask_i, mask_n, C * s)
            if WANT_LIVE:
                store_tile(live_ptr, stride_lr, 1, offs_i, offs_n, mask_i, mask_n, C_live * s)


def pack(j: Projection, dtype: torch.dtype, A: bool, C: bool, C_live: bool) -> Packed:
    """A [r, K], C = s·(R_frozen + R)·B and C_live = s·R·B [r, N] in ``dtype``, C = s·B with a bank; one launch.

    What is written has rows of a multiple of 16 bytes; a lora_A that has the dtype already is taken as it is.
    """
    r, K = j.lora_A.shape
    N = j.lora_B.shape[0]
    cast_A = A and j.lora_A.dtype != dtype
    packed_A = _rows(j.lora_A, r, K, dtype) if cast_A else None
    packed_C = _rows(j.lora_A, r, N, dtype) if C else None
    live = _rows(j.lora_A, r, N, dtype) if C_live else None
    tiles_of_A, block_r = cdiv(K, BLOCK) if cast_A else 0, block_of_rank(r, BLOCK_OF_RANKS)
    grid = (
        tiles_of_A + (cdiv(N, BLOCK) if C or C_live else 0),
        cdiv(r, block_of_rank(r, BLOCK_OF_RANKS)),
    )
    if grid[0]:
        routing, frozen = routings(j, not j.bank)
        with on_device_of(j.lora_A):
            launch(
                pack_kernel, grid, j.lora_A, *j.lora_A.stride(), j.lora_B, *j.lora_B.stride(), *routing, *frozen,
                number_for(j.lora_A.device, j.scaling), *_pitch(packed_A, j.lora_A), *_pitch(packed_C, j.lora_A),
                *_pitch(live, j.lora_A), N, K, r, tiles_of_A, WANT_C=C, WANT_LIVE=C_live,
                IDENTITY=j.routing is None or j.bank, FROZEN=frozen[0] is not j.lora_A,
                BLOCK=BLOCK, BLOCK_R=block_r, num_warps=block_r // 4,
            )  # fmt: skip
    return Packed(packed_A if cast_A else j.lora_A if A else None, packed_C, live)


def _rows(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] in a buffer whose rows are a multiple of 16 bytes."""
    whole = torch.empty((rows, cdiv(columns, 8) * 8), dtype=dtype, device=like.device)
    return whole[:, :columns] if columns % 8 else whole


def _pitch(t: Tensor | None, placeholder: Tensor) -> tuple[Tensor, int]:
    return (placeholder, 0) if t is None else (t, t.stride(0))


def routings(j: Projection, folded: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(routing, its strides), (frozen routing, its strides); lora_A in the place of one that is not there or, with a
    bank, not folded."""
    none = (j.lora_A, 0, 0)
    routing = none if j.routing is None or not folded else (j.routing, *j.routing.stride())
    frozen = none if j.frozen_routing is None or not folded else (j.frozen_routing, *j.frozen_routing.stride())
    return routing, frozen


def routing_forms(dtype: str | None, frozen: bool) -> dict[str, Any]:
    live = {"routing_ptr": f"*{dtype or 'fp32'}", "stride_ti": "i32", "stride_tj": 1 if dtype else "i32"}
    return {**live, "frozen_ptr": live["routing_ptr"], "stride_fi": "i32", "stride_fj": 1 if frozen else "i32"}


def _form(dtype: str, out: str, r: int, routing: bool = True, frozen: bool = False, live: bool = False, scaling="fp32"):
    """A launch of ``pack_kernel``: parameters of ``dtype``, packed in ``out``."""
    block_r = min(max(r, 16), BLOCK_OF_RANKS)
    arguments = {
        "lora_A_ptr": f"*{dtype}", "stride_ar": "i32", "stride_ak": 1, "lora_B_ptr": f"*{dtype}", "stride_bn": "i32",
        "stride_br": 1, **routing_forms(dtype if routing else None, frozen), "scaling": scaling,
        "A_ptr": f"*{out}", "stride_pr": "i32", "C_ptr": f"*{out}", "stride_cr": "i32", "live_ptr": f"*{out}",
        "stride_lr": "i32", "N": "i32", "K": "i32", "r": "i32", "tiles_of_A": "i32", "WANT_C": True, "WANT_LIVE": live,
        "IDENTITY": not routing, "FROZEN": frozen, "BLOCK": BLOCK, "BLOCK_R": block_r,
    }  # fmt: skip
    return form(pack_kernel, arguments, num_warps=block_r // 4, expects=Expects(wgmma=False))


# r×r and r×N operands in fp32, exact; the loop over ranks is short, mostly of one turn.
COMPILATIONS = [
    _form("fp32", "bf16", 16, routing=False),
    _form("fp32", "bf16", 16),
    _form("fp32", "bf16", 256, frozen=True, live=True),
    _form("bf16", "bf16", 16, frozen=True, scaling="*fp32"),
    _form("fp32", "fp32", 16),
]
