"""``shrink``: a big operand [M, K] times small ones [r, K], gated; the big one is read once for all of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...declared import Expects
from ...launch import cdiv, launch
from ..algebra import Term
from ..tables import table_of
from ..tiles import ShrinkTile, key_of, look_up
from .common import (
    capability,
    chunks,
    dot,
    kept,
    kept_value,
    load_threshold,
    load_tile,
    on_device_of,
    precision,
    scalar_on,
    split,
    store_tile,
)
from .forms import form, tile_for, tiled


@triton.jit
def store_term(
    acc, sum_ptr, gated_ptr, gate_ptr, stride_gm, stride_gr, threshold_ptr, rank, offs_m, mask_m, BLOCK_R: tl.constexpr
):
    """The sum [M, rank] fp32, and sum · kept value ⊙ gate rounded, where each is wanted; both contiguous."""
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < rank
    if sum_ptr is not None:
        store_tile(sum_ptr, rank, 1, offs_m, offs_r, mask_m, mask_r, acc)
    if gated_ptr is not None:
        if threshold_ptr is not None:
            acc *= kept_value(threshold_ptr)
        if gate_ptr is not None:
            acc *= load_tile(gate_ptr, stride_gm, stride_gr, offs_m, offs_r, mask_m, mask_r)  # [BLOCK_M, BLOCK_R]
        store_tile(gated_ptr, rank, 1, offs_m, offs_r, mask_m, mask_r, acc)


@triton.jit(do_not_specialize=["M"])
def shrink_kernel(
    big_ptr, stride_bm, stride_bk, small_ptrs, strides_sr, strides_sk, ranks, seed_ptrs, mask_ptrs,
    gate_ptrs, strides_gm, strides_gr, threshold_ptrs, sum_ptrs, gated_ptrs, parts_ptr, M, K, steps,
    TERMS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tuples hold one entry a term; None where a term has no mask, no gate, or an output is not wanted. mask_ptrs:
    thresholds of masks that act here; threshold_ptrs: of draws whose kept value counts. With ``parts_ptr`` axis 1
    splits K, ``steps`` blocks a part, and unfinished sums are stored [splits, TERMS, M, BLOCK_R]."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    first = tl.program_id(1) * steps * BLOCK_K
    accs, seeds, thresholds = (), (), ()
    for j in tl.static_range(TERMS):
        accs = accs + (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),)
        if seed_ptrs[j] is None:
            seeds, thresholds = seeds + (0,), thresholds + (0,)
        else:
            seeds = seeds + (tl.load(seed_ptrs[j]),)
            thresholds = thresholds + (load_threshold(mask_ptrs[j]),)
    for k in range(first, tl.minimum(first + steps * BLOCK_K, K), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        big = load_tile(big_ptr, stride_bm, stride_bk, offs_m, offs_k, mask_m, mask_k)  # [BLOCK_M, BLOCK_K]
        sums = ()
        for j in tl.static_range(TERMS):
            small = load_tile(small_ptrs[j], strides_sk[j], strides_sr[j], offs_k, offs_r, mask_k, offs_r < ranks[j])
            if seed_ptrs[j] is None:
                left = big
            else:
                keep = kept(seeds[j], thresholds[j], offs_m, k, K, BLOCK_M, BLOCK_K)
                left = tl.where(keep, big, tl.zeros_like(big))
            sums = sums + (dot(left, small, accs[j], PRECISION),)  # [BLOCK_M, BLOCK_K]·[BLOCK_K, BLOCK_R]
        accs = sums
    for j in tl.static_range(TERMS):
        if parts_ptr is None:
            store_term(
                accs[j], sum_ptrs[j], gated_ptrs[j], gate_ptrs[j], strides_gm[j], strides_gr[j], threshold_ptrs[j],
                ranks[j], offs_m, mask_m, BLOCK_R,
            )  # fmt: skip
        else:
            part = parts_ptr + (tl.program_id(1) * TERMS + j).to(tl.int64) * M * BLOCK_R
            store_tile(part, BLOCK_R, 1, offs_m, offs_r, mask_m, offs_r < BLOCK_R, accs[j])


@triton.jit(do_not_specialize=["M"])
def shrink_sums_kernel(
    parts_ptr, splits, ranks, gate_ptrs, strides_gm, strides_gr, threshold_ptrs, sum_ptrs, gated_ptrs, M,
    TERMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a split over K in their order, and finishes each term."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    size = M.to(tl.int64) * BLOCK_R
    for j in tl.static_range(TERMS):
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        part = parts_ptr + size * j
        for _ in range(splits):
            acc += load_tile(part, BLOCK_R, 1, offs_m, offs_r, mask_m, offs_r < BLOCK_R)  # [BLOCK_M, BLOCK_R]
            part += size * TERMS
        store_term(
            acc, sum_ptrs[j], gated_ptrs[j], gate_ptrs[j], strides_gm[j], strides_gr[j], threshold_ptrs[j],
            ranks[j], offs_m, mask_m, BLOCK_R,
        )  # fmt: skip


def shrink(big: Tensor, terms: list[Term]) -> list[tuple[Tensor | None, Tensor | None]]:
    """For each term, where wanted: (mask ⊙ big)·smallᵀ [M, r] in fp32, and that · kept value ⊙ gate in big.dtype.

    big [M, K] and the small operands [r, K] in its dtype, gates [M, r] in fp32, any strides. big is read once for terms
    of up to 256 ranks together (each padded to the block of the largest). Where M alone gives too few programs K is
    split; the parts, fp32 [splits, terms, M, block of ranks], are then scratch of ``SCRATCH_BYTES`` at most.
    """
    M = big.shape[0]
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for chunk, block_r in chunks(terms, [t.small.shape[0] for t in terms]):
        outputs = []
        for t in chunk:
            r = t.small.shape[0]
            unrounded = torch.empty((M, r), dtype=torch.float32, device=big.device) if t.want_sum else None
            gated = torch.empty((M, r), dtype=big.dtype, device=big.device) if t.want_gated else None
            outputs.append((unrounded, gated))
        if M:
            with on_device_of(big):
                _launch(big, list(chunk), outputs, block_r)
        found += outputs
    return found


def _launch(big: Tensor, terms: list[Term], outputs: list[tuple[Tensor | None, Tensor | None]], block_r: int) -> None:
    M, K = big.shape
    of_sums, of_finish = [], []
    masked, rank = False, block_r * len(terms)
    for t, written in zip(terms, outputs, strict=True):
        mask = t.dropout if t.masked else None
        masked |= mask is not None
        threshold = None if t.dropout is None else scalar_on(big.device, t.dropout.threshold)
        draw = (None, None) if mask is None else (mask.seed, threshold)
        of_sums.append((t.small, *t.small.stride(), t.small.shape[0], *draw))
        of_finish.append((t.gate, *((0, 0) if t.gate is None else t.gate.stride()), threshold, *written))
    sums, finish = tuple(zip(*of_sums, strict=True)), tuple(zip(*of_finish, strict=True))
    key = key_of("shrink", capability(big), big.dtype, M, 0, K, rank, len(terms), masked)
    tile: ShrinkTile = look_up(key, table_of(big).tiles)
    blocks_of_rows = cdiv(M, tile.block_m)
    steps, splits = split(cdiv(K, tile.block_k), blocks_of_rows, 4 * M * rank, tile, big)
    parts = None
    if splits > 1:
        parts = torch.empty((splits, len(terms), M, block_r), dtype=torch.float32, device=big.device)
    launch(
        shrink_kernel, (blocks_of_rows, splits), big, *big.stride(), *sums, *finish, parts, M, K, steps,
        TERMS=len(terms), PRECISION=precision(big.dtype), BLOCK_M=tile.block_m, BLOCK_R=block_r, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if parts is not None:
        launch(
            shrink_sums_kernel, (cdiv(M, 16),), parts, splits, sums[3], *finish, M,
            TERMS=len(terms), BLOCK_M=16, BLOCK_R=block_r,
        )  # fmt: skip


def _form(
    architecture: int, dtype: str, r: int, terms: int = 1, *, masked=False, gated=False, parts=False, precision="ieee"
):
    """A launch of ``shrink_kernel``; gated: kept value, gate and unrounded sum too."""
    tile = tile_for("shrink", architecture, dtype, r * terms, terms=terms, dropout=masked)
    seed, threshold = "*i64" if masked else None, "*i64" if masked or gated else None
    each = {
        "small_ptrs": f"*{dtype}", "strides_sr": "i32", "strides_sk": 1, "ranks": "i32", "seed_ptrs": seed,
        "mask_ptrs": seed, "gate_ptrs": "*fp32" if gated else None, "strides_gm": "i32",
        "strides_gr": 1 if gated else "i32", "threshold_ptrs": threshold,
        "sum_ptrs": "*fp32" if gated else None, "gated_ptrs": f"*{dtype}",
    }  # fmt: skip
    arguments = {
        "big_ptr": f"*{dtype}", "stride_bm": "i32", "stride_bk": 1, "parts_ptr": "*fp32" if parts else None,
        "M": "i32", "K": "i32", "steps": "i32", "TERMS": terms, "PRECISION": precision,
        "BLOCK_M": tile.block_m, "BLOCK_R": r, "BLOCK_K": tile.block_k, **{k: (v,) * terms for k, v in each.items()},
    }  # fmt: skip
    expects = Expects(wgmma=dtype != "fp32", tf32=precision == "tf32")
    return form(shrink_kernel, arguments, **tiled(tile, architecture, expects))


def _sums_form(dtype: str, r: int, terms: int):
    each = {
        "ranks": "i32", "gate_ptrs": "*fp32", "strides_gm": "i32", "strides_gr": 1, "threshold_ptrs": "*i64",
        "sum_ptrs": "*fp32", "gated_ptrs": f"*{dtype}",
    }  # fmt: skip
    arguments = {"parts_ptr": "*fp32", "splits": "i32", "M": "i32", "TERMS": terms, "BLOCK_M": 16, "BLOCK_R": r}
    return form(shrink_sums_kernel, {**arguments, **{k: (v,) * terms for k, v in each.items()}})


COMPILATIONS = [
    *(
        _form(architecture, dtype, r, terms, **flags)
        for architecture in (80, 90)
        for dtype, r, terms, flags in (
            ("bf16", 16, 1, {}),
            ("bf16", 16, 1, {"masked": True, "gated": True}),
            ("bf16", 64, 1, {"gated": True}),
            ("bf16", 64, 1, {"masked": True, "parts": True}),
            ("bf16", 256, 1, {}),
            ("bf16", 256, 1, {"masked": True}),
            ("bf16", 16, 2, {"gated": True}),
            ("bf16", 16, 3, {}),
            ("bf16", 16, 3, {"masked": True}),
            ("bf16", 64, 3, {"masked": True}),
            ("fp16", 16, 1, {"parts": True}),
            ("fp32", 16, 1, {"gated": True}),
            ("fp32", 16, 1, {"masked": True}),
            ("fp32", 256, 1, {"masked": True, "gated": True}),
            ("fp32", 16, 3, {"masked": True}),
            ("fp32", 16, 1, {"precision": "tf32"}),
        )
    ),
    _sums_form("bf16", 16, 1),
    _sums_form("fp32", 256, 1),
]
