"""``pack`` and its backward ``unpack``: everything of size r×r, r×K and r×N, in fp32, rounded once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..algebra import Needs, Packed, Projection
from .common import block_of_rank, dot, load_tile, on_device_of, rounded, scalar_on, store_tile, widened

BLOCK = 64
"""Columns a program works on, and steps of the sum over N of dR."""

MOST_SPLITS = 32
"""Parts of N that are summed apart for dR: scratch of 4·32·r² bytes at most, 8 MiB at rank 256."""


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
    routing_ptr, stride_ti, stride_tj, frozen_ptr, stride_fi, stride_fj, scaling_ptr,
    A_ptr, stride_pr, C_ptr, stride_cr, live_ptr, stride_lr, N, K, r, tiles_of_A,
    WANT_C: tl.constexpr, WANT_LIVE: tl.constexpr, IDENTITY: tl.constexpr, FROZEN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The first ``tiles_of_A`` programs write A [r, K], the others C and C_live [r, N]; axis 1 counts blocks of ranks."""
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
        scaling = widened(tl.load(scaling_ptr))
        if IDENTITY:
            b = load_tile(lora_B_ptr, stride_br, stride_bn, offs_i, offs_n, mask_i, mask_n)  # [BLOCK_R, BLOCK]
            store_tile(C_ptr, stride_cr, 1, offs_i, offs_n, mask_i, mask_n, widened(b) * scaling)
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
                store_tile(C_ptr, stride_cr, 1, offs_i, offs_n, mask_i, mask_n, C * scaling)
            if WANT_LIVE:
                store_tile(live_ptr, stride_lr, 1, offs_i, offs_n, mask_i, mask_n, C_live * scaling)


@triton.jit
def unpack_B_kernel(
    U_ptr, stride_ur, stride_un, routing_ptr, stride_ti, stride_tj, scaling_ptr, dB_ptr, N, r,
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
    dB *= widened(tl.load(scaling_ptr))
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
def unpack_sums_kernel(parts_ptr, splits, scaling_ptr, dR_ptr, r, BLOCK: tl.constexpr):
    """dR = s·Σ parts [r, r], contiguous, in the order of the parts."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(parts_ptr + offs, mask=offs < r * r, other=0.0)  # [BLOCK]
        parts_ptr += r * r
    acc *= widened(tl.load(scaling_ptr))
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
    tiles_of_A = triton.cdiv(K, BLOCK) if cast_A else 0
    grid = (tiles_of_A + (triton.cdiv(N, BLOCK) if C or C_live else 0), triton.cdiv(r, block_of_rank(r, BLOCK)))
    if grid[0]:
        routing, frozen = _routings(j, not j.bank)
        with on_device_of(j.lora_A):
            pack_kernel[grid](
                j.lora_A, *j.lora_A.stride(), j.lora_B, *j.lora_B.stride(), *routing, *frozen,
                scalar_on(j.lora_A.device, j.scaling), *_pitch(packed_A, j.lora_A), *_pitch(packed_C, j.lora_A),
                *_pitch(live, j.lora_A), N, K, r, tiles_of_A, WANT_C=C, WANT_LIVE=C_live,
                IDENTITY=j.routing is None or j.bank, FROZEN=frozen[0] is not j.lora_A,
                BLOCK=BLOCK, BLOCK_R=block_of_rank(r, BLOCK),
            )  # fmt: skip
    return Packed(packed_A if cast_A else j.lora_A if A else None, packed_C, live)


def unpack(j: Projection, U: Tensor, need: Needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dB = s·Rᵀ·U, dR = s·U·Bᵀ and ds = ⟨U, (R_frozen + R)·B⟩ for U [r, N] fp32, each in its argument's dtype.

    dR and ds are summed over parts of N that depend on N alone, in a fixed order.
    """
    r, N = U.shape
    block_r = block_of_rank(r, BLOCK)
    routing, frozen = _routings(j, True)
    scaling = scalar_on(U.device, j.scaling)
    identity, has_frozen = j.routing is None, frozen[0] is not j.lora_A
    dB = dR = dscaling = None
    with on_device_of(U):
        if need.lora_B:
            dB = torch.empty((N, r), dtype=j.lora_B.dtype, device=U.device)
            grid = (triton.cdiv(N, BLOCK), triton.cdiv(r, block_r))
            unpack_B_kernel[grid](
                U, *U.stride(), *routing, scaling, dB, N, r, IDENTITY=identity, BLOCK=BLOCK, BLOCK_R=block_r
            )
        if need.routing or need.scaling:
            parts, splits = _routing_parts(j.lora_B, U, block_r)
        if need.routing:
            dR = torch.empty((r, r), dtype=j.routing.dtype, device=U.device)
            unpack_sums_kernel[(triton.cdiv(r * r, 256),)](parts, splits, scaling, dR, r, BLOCK=256)
        if need.scaling:
            ds = torch.empty((), dtype=torch.float32, device=U.device)
            unpack_scaling_kernel[(1,)](
                parts, splits, *routing, *frozen, ds, r, IDENTITY=identity, FROZEN=has_frozen, BLOCK_R=block_of_rank(r)
            )
            dscaling = ds.to(j.scaling)
    return dB, dR, dscaling


def _routing_parts(lora_B: Tensor, U: Tensor, block_r: int) -> tuple[Tensor, int]:
    """U·lora_B [splits, r, r] in parts, and how many."""
    r, N = U.shape
    steps = max(triton.cdiv(triton.cdiv(N, BLOCK), MOST_SPLITS), 2)
    splits = max(triton.cdiv(N, steps * BLOCK), 1)
    parts = torch.empty((splits, r, r), dtype=torch.float32, device=U.device)
    tiles = triton.cdiv(r, block_r)
    unpack_routing_kernel[(tiles, tiles, splits)](
        U, *U.stride(), lora_B, *lora_B.stride(), parts, N, r, steps, BLOCK=BLOCK, BLOCK_R=block_r
    )
    return parts, splits


def _rows(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] in a buffer whose rows are a multiple of 16 bytes."""
    return torch.empty((rows, triton.cdiv(columns, 8) * 8), dtype=dtype, device=like.device)[:, :columns]


def _pitch(t: Tensor | None, placeholder: Tensor) -> tuple[Tensor, int]:
    return (placeholder, 0) if t is None else (t, t.stride(0))


def _routings(j: Projection, folded: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(routing, its strides), (frozen routing, its strides); lora_A in the place of one that is not there or, with a
    bank, not folded."""
    none = (j.lora_A, 0, 0)
    routing = none if j.routing is None or not folded else (j.routing, *j.routing.stride())
    frozen = none if j.frozen_routing is None or not folded else (j.frozen_routing, *j.frozen_routing.stride())
    return routing, frozen
