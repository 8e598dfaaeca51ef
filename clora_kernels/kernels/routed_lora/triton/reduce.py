"""``reduce``: small operands [M, r], transposed, times a big one [M, K]; the big one is read once for all of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...declared import Expects
from ...launch import cdiv, launch
from ..algebra import Dropout
from ..tables import table_of
from ..tiles import ReduceTile, key_of, look_up
from .common import (
    capability,
    chunks,
    dot,
    kept,
    load_threshold,
    load_tile,
    on_device_of,
    precision,
    scalar_on,
    split,
    store_tile,
)
from .forms import form, tile_for, tiled


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    small_ptrs, strides_sm, strides_sr, ranks, big_ptr, stride_bm, stride_bk, seed_ptrs, threshold_ptrs, part_ptrs,
    M, K, steps, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Axis 0: columns of big, axis 1: parts of M, ``steps`` blocks long, into parts [splits, r, K] of each term. Tuples
    hold one entry a term, None where a term has no mask. Sums stand transposed, [BLOCK_K, BLOCK_R]: tensor cores want
    64 rows, more than most ranks."""
    pid_k = tl.program_id(0)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_k = offs_k < K
    first = tl.program_id(1).to(tl.int64) * steps * BLOCK_M
    accs, seeds, thresholds = (), (), ()
    for j in tl.static_range(TERMS):
        accs = accs + (tl.zeros((BLOCK_K, BLOCK_R), tl.float32),)
        if seed_ptrs[j] is None:
            seeds, thresholds = seeds + (0,), thresholds + (0,)
        else:
            seeds = seeds + (tl.load(seed_ptrs[j]),)
            thresholds = thresholds + (load_threshold(threshold_ptrs[j]),)
    for m in range(first, tl.minimum(first + steps * BLOCK_M, M), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        big = load_tile(big_ptr, stride_bk, stride_bm, offs_k, offs_m, mask_k, mask_m)  # [BLOCK_K, BLOCK_M]
        sums = ()
        for j in tl.static_range(TERMS):
            small = load_tile(small_ptrs[j], strides_sm[j], strides_sr[j], offs_m, offs_r, mask_m, offs_r < ranks[j])
            if seed_ptrs[j] is None:
                left = big
            else:
                keep = kept(seeds[j], thresholds[j], offs_m, pid_k * BLOCK_K, K, BLOCK_M, BLOCK_K)
                left = tl.where(keep.T, big, tl.zeros_like(big))
            sums = sums + (dot(left, small, accs[j], PRECISION),)  # [BLOCK_K, BLOCK_M]·[BLOCK_M, BLOCK_R]
        accs = sums
    for j in tl.static_range(TERMS):
        part = part_ptrs[j] + tl.program_id(1).to(tl.int64) * ranks[j] * K
        store_tile(part, K, 1, offs_r, offs_k, offs_r < ranks[j], mask_k, accs[j].T)


@triton.jit
def reduce_sums_kernel(parts_ptr, splits, out_ptr, size, BLOCK: tl.constexpr):
    """out [size] = Σ parts [splits, size], in their order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(parts_ptr + offs, mask=offs < size, other=0.0)  # [BLOCK]
        parts_ptr += size
    tl.store(out_ptr + offs, acc, mask=offs < size)


def reduce(small: list[Tensor], big: Tensor, dropout: list[Dropout | None]) -> list[Tensor]:
    """small_jᵀ ([M, r_j]) times mask_j ⊙ big [M, K] → [r_j, K] in fp32, contiguous; any strides.

    big is read once for small operands of up to 256 ranks together (each padded to the block of the largest). M is cut
    into parts by M, K and the device alone and these are added in their order, so the same call gives the same bits.
    The parts, fp32 [splits, r, K] for each small operand, are scratch of ``SCRATCH_BYTES`` at most.
    """
    K = big.shape[1]
    out = [torch.empty((t.shape[1], K), dtype=torch.float32, device=big.device) for t in small]
    if K:
        terms = list(zip(small, dropout, out, strict=True))
        with on_device_of(big):
            for chunk, block_r in chunks(terms, [t.shape[1] for t in small]):
                _launch(big, list(chunk), block_r)
    return out


def _launch(big: Tensor, terms: list[tuple[Tensor, Dropout | None, Tensor]], block_r: int) -> None:
    M, K = big.shape
    small, dropout, out = zip(*terms, strict=True)
    masked, rank = any([d is not None for d in dropout]), block_r * len(terms)
    operands = tuple(zip(*[(t, *t.stride(), t.shape[1]) for t in small], strict=True))
    key = key_of("reduce", capability(big), big.dtype, M, 0, K, rank, len(terms), masked)
    tile: ReduceTile = look_up(key, table_of(big).tiles)
    blocks_of_columns = cdiv(K, tile.block_k)
    steps, splits = split(cdiv(M, tile.block_m), blocks_of_columns, 4 * sum([t.numel() for t in out]), tile, big)
    parts = out
    if splits > 1:
        parts = tuple([torch.empty((splits, *t.shape), dtype=torch.float32, device=big.device) for t in out])
    launch(
        reduce_kernel, (blocks_of_columns, splits),
        *operands, big, *big.stride(), tuple([None if d is None else d.seed for d in dropout]),
        tuple([None if d is None else scalar_on(big.device, d.threshold) for d in dropout]), parts, M, K, steps,
        TERMS=len(terms), PRECISION=precision(big.dtype), BLOCK_M=tile.block_m, BLOCK_R=block_r, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        for part, total in zip(parts, out, strict=True):
            launch(reduce_sums_kernel, (cdiv(total.numel(), 1024),), part, splits, total, total.numel(), BLOCK=1024)


def _form(architecture: int, dtype: str, r: int, terms: int = 1, *, masked=False, precision="ieee"):
    """A launch of ``reduce_kernel``."""
    tile = tile_for("reduce", architecture, dtype, r * terms, terms=terms, dropout=masked)
    seed = "*i64" if masked else None
    each = {
        "small_ptrs": f"*{dtype}", "strides_sm": "i32", "strides_sr": 1, "ranks": "i32", "seed_ptrs": seed,
        "threshold_ptrs": seed, "part_ptrs": "*fp32",
    }  # fmt: skip
    arguments = {
        "big_ptr": f"*{dtype}", "stride_bm": "i32", "stride_bk": 1, "M": "i32", "K": "i32", "steps": "i32",
        "TERMS": terms, "PRECISION": precision, "BLOCK_M": tile.block_m, "BLOCK_R": r, "BLOCK_K": tile.block_k,
        **{k: (v,) * terms for k, v in each.items()},
    }  # fmt: skip
    expects = Expects(wgmma=dtype != "fp32", tf32=precision == "tf32")
    return form(reduce_kernel, arguments, **tiled(tile, architecture, expects))


COMPILATIONS = [
    *(
        _form(architecture, dtype, r, terms, **flags)
        for architecture in (80, 90)
        for dtype, r, terms, flags in (
            ("bf16", 16, 1, {}),
            ("bf16", 16, 1, {"masked": True}),
            ("bf16", 64, 1, {}),
            ("bf16", 256, 1, {}),
            ("bf16", 256, 1, {"masked": True}),
            ("bf16", 16, 3, {}),
            ("bf16", 16, 3, {"masked": True}),
            ("bf16", 64, 3, {"masked": True}),
            ("fp16", 16, 1, {}),
            ("fp32", 16, 1, {}),
            ("fp32", 256, 1, {"masked": True}),
            ("fp32", 16, 3, {"masked": True}),
            ("fp32", 16, 1, {"precision": "tf32"}),
        )
    ),
    form(reduce_sums_kernel, {"parts_ptr": "*fp32", "splits": "i32", "out_ptr": "*fp32", "size": "i32", "BLOCK": 1024}),
]
