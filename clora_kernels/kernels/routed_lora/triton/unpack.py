"""``unpack``, the backward of ``pack``: dB = s·Rᵀ·U, dR = s·U·Bᵀ and ds, in fp32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...declared import Expects
from ...launch import cdiv, launch
from ..algebra import Needs, Projection
from .common import block_of_rank, dot, load_tile, number, number_for, on_device_of, rounded, store_tile, widened
from .forms import form
from .pack import BLOCK, BLOCK_OF_RANKS, load_routing, routing_forms, routings

MOST_SPLITS = 32
"""Parts of N that are summed apart for dR: scratch of 4·32·r² bytes at most, 8 MiB at rank 256."""


@triton.jit
def unpack_B_kernel(
    U_ptr, stride_ur, stride_un, routing_ptr, stride_ti, stride_tj, scaling, dB_ptr, N, r,
    IDENTITY: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dB = s·Uᵀ·R [N, r], contiguous."""
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_i = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n, mask_i = offs_n < N, offs_i < r
    if IDENTITY:
        dB = load_tile(U_ptr, stride_un, stride_ur, offs_n, offs_i, mask_n, mask_i)  # [BLOCK, BLOCK_R]
    else:
        dB = tl.zeros((BLOCK, BLOCK_R), tl.float32)
        for j in range(0, r, BLOCK_R):
            offs_j = j + tl.arange(0, BLOCK_R)
            u = load_tile(U_ptr, stride_un, stride_ur, offs_n, offs_j, mask_n, offs_j < r)  # [BLOCK, BLOCK_R]
            live = widened(load_tile(routing_ptr, stride_ti, stride_tj, offs_j, offs_i, offs_j < r, mask_i))
            dB = dot(u, live, dB, "ieee")  # [BLOCK, BLOCK_R]·[BLOCK_R, BLOCK_R]
    dB *= number(scaling)
    store_tile(dB_ptr, r, 1, offs_n, offs_i, mask_n, mask_i, dB)


@triton.jit
def unpack_routing_kernel(
    U_ptr, stride_ur, stride_un, lora_B_ptr, stride_bn, stride_br, parts_ptr, N, r, steps,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """U·lora_B over the part of N of axis 2, ``steps`` blocks long, into parts [splits, r, r]."""
    offs_i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(2) * steps * BLOCK
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for n in range(first, tl.minimum(first + steps * BLOCK, N), BLOCK):
        offs_n = n + tl.arange(0, BLOCK)
        u = load_tile(U_ptr, stride_ur, stride_un, offs_i, offs_n, offs_i < r, offs_n < N)  # [BLOCK_R, BLOCK]
        b = widened(load_tile(lora_B_ptr, stride_bn, stride_br, offs_n, offs_j, offs_n < N, offs_j < r))
        acc = dot(u, b, acc, "ieee")  # [BLOCK_R, BLOCK]·[BLOCK, BLOCK_R]
    store_tile(parts_ptr + tl.program_id(2) * r * r, r, 1, offs_i, offs_j, offs_i < r, offs_j < r, acc)


@triton.jit
def unpack_sums_kernel(parts_ptr, splits, scaling, dR_ptr, r, BLOCK: tl.constexpr):
    """dR = s·Σ parts [r, r], contiguous, in the order of the parts."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(parts_ptr + offs, mask=offs < r * r, other=0.0)  # [BLOCK]
        parts_ptr += r * r
    acc *= number(scaling)
    tl.store(dR_ptr + offs, rounded(acc, dR_ptr.dtype.element_ty), mask=offs < r * r)


@triton.jit
def unpack_scaling_kernel(
    parts_ptr, splits, routing_ptr, stride_ti, stride_tj, frozen_ptr, stride_fi, stride_fj, ds_ptr, r,
    IDENTITY: tl.constexpr, FROZEN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """ds = ⟨U, (R_frozen + R)·B⟩ = ⟨R_frozen + R, Σ parts⟩, by one program."""
    offs_i = tl.arange(0, 16)
    offs_j = tl.arange(0, BLOCK_R)
    acc = tl.zeros((16, BLOCK_R), tl.float32)
    for i in range(0, r, 16):
        mask_i = i + offs_i < r
        total, _ = load_routing(
            routing_ptr, stride_ti, stride_tj, frozen_ptr, stride_fi, stride_fj,
            i + offs_i, offs_j, mask_i, offs_j < r, IDENTITY, FROZEN,
        )  # fmt: skip
        for k in range(splits):
            acc += total * load_tile(parts_ptr + k * r * r, r, 1, i + offs_i, offs_j, mask_i, offs_j < r)
    tl.store(ds_ptr, tl.sum(acc))


def unpack(j: Projection, U: Tensor, need: Needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dB = s·Rᵀ·U, dR = s·U·Bᵀ and ds = ⟨U, (R_frozen + R)·B⟩ for U [r, N] fp32, each in its argument's dtype.

    dR and ds are summed over parts of N that depend on N alone, in a fixed order.
    """
    r, N = U.shape
    block_r = block_of_rank(r, BLOCK_OF_RANKS)
    routing, frozen = routings(j, True)
    scaling = number_for(U.device, j.scaling)
    identity, has_frozen = j.routing is None, frozen[0] is not j.lora_A
    dB = dR = dscaling = None
    with on_device_of(U):
        if need.lora_B:
            dB = torch.empty((N, r), dtype=j.lora_B.dtype, device=U.device)
            grid = (cdiv(N, BLOCK), cdiv(r, block_r))
            launch(
                unpack_B_kernel, grid, U, *U.stride(), *routing, scaling, dB, N, r,
                IDENTITY=identity, BLOCK=BLOCK, BLOCK_R=block_r,
            )  # fmt: skip
        if need.routing or need.scaling:
            parts, splits = _routing_parts(j.lora_B, U, block_r)
        if need.routing:
            dR = torch.empty((r, r), dtype=j.routing.dtype, device=U.device)
            launch(unpack_sums_kernel, (cdiv(r * r, 256),), parts, splits, scaling, dR, r, BLOCK=256)
        if need.scaling:
            ds = torch.empty((), dtype=torch.float32, device=U.device)
            launch(
                unpack_scaling_kernel, (1,), parts, splits, *routing, *frozen, ds, r,
                IDENTITY=identity, FROZEN=has_frozen, BLOCK_R=block_of_rank(r),
            )  # fmt: skip
            dscaling = ds.to(j.scaling)
    return dB, dR, dscaling


def _routing_parts(lora_B: Tensor, U: Tensor, block_r: int) -> tuple[Tensor, int]:
    """U·lora_B [splits, r, r] in parts, and how many."""
    r, N = U.shape
    steps = max(cdiv(cdiv(N, BLOCK), MOST_SPLITS), 2)
    splits = max(cdiv(N, steps * BLOCK), 1)
    parts = torch.empty((splits, r, r), dtype=torch.float32, device=U.device)
    tiles = cdiv(r, block_r)
    launch(
        unpack_routing_kernel, (tiles, tiles, splits), U, *U.stride(), lora_B, *lora_B.stride(), parts, N, r, steps,
        BLOCK=BLOCK, BLOCK_R=block_r,
    )  # fmt: skip
    return parts, splits


def _forms(dtype: str, r: int, routing: bool = True):
    """The launches of ``unpack`` for parameters of ``dtype``."""
    R, block_r = routing_forms(dtype if routing else None, routing), min(max(r, 16), BLOCK_OF_RANKS)
    live = {k: v for k, v in R.items() if not k.startswith(("frozen", "stride_f"))}
    U = {"U_ptr": "*fp32", "stride_ur": "i32", "stride_un": 1, "N": "i32", "r": "i32", "BLOCK": BLOCK}
    B = {"lora_B_ptr": f"*{dtype}", "stride_bn": "i32", "stride_br": 1}
    of_B = {**U, **live, "scaling": "fp32", "dB_ptr": f"*{dtype}", "IDENTITY": not routing, "BLOCK_R": block_r}
    of_R = {**U, **B, "parts_ptr": "*fp32", "steps": "i32", "BLOCK_R": block_r}
    sums = {
        "parts_ptr": "*fp32",
        "splits": "i32",
        "scaling": "*fp32",
        "dR_ptr": f"*{dtype}",
        "r": "i32",
        "BLOCK": 256,
    }
    s = {"parts_ptr": "*fp32", "splits": "i32", **R, "ds_ptr": "*fp32", "r": "i32", "IDENTITY": not routing}
    return [
        form(unpack_B_kernel, of_B, expects=Expects(wgmma=False)),
        form(unpack_routing_kernel, of_R, expects=Expects(wgmma=False)),
        form(unpack_sums_kernel, sums),
        form(unpack_scaling_kernel, {**s, "FROZEN": routing, "BLOCK_R": max(r, 16)}),
    ]


COMPILATIONS = [*_forms("fp32", 16), *_forms("fp32", 256), *_forms("bf16", 16, routing=False)]
