"""The sizes the kernels run with: conservative defaults, and what a table knows better.

A look-up depends on the dtype, the class of compute capability, the sizes of the layer and the *bucket* of M, never on
M itself, and on the rank as it is padded. The defaults compile without spilling on every architecture they are for;
that of ``linear`` for many rows of 16 bit by TMA, without dropout, is the fastest of those tried on an H200 or within
1 % of it, the others are not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

INTERPRETER = 0
"""The capability class of Triton's interpreter: small tiles, so that small tensors have several."""


@dataclass(frozen=True)
class LinearTile:
    """``linear``: y in blocks [block_m, block_n], group_m blocks of rows a group, per_sm programs a multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    per_sm: int = 1


@dataclass(frozen=True)
class ShrinkTile:
    """``shrink``: rows in blocks of block_m, the inner dimension in blocks of block_k.

    It is split for per_sm programs a multiprocessor, in most_splits parts at most and least_steps blocks a part.
    """

    block_m: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    per_sm: int = 4
    most_splits: int = 16
    least_steps: int = 4


@dataclass(frozen=True)
class ReduceTile:
    """``reduce``: columns in blocks of block_k, the rows summed over in blocks of block_m; split as by ``shrink``."""

    block_m: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    per_sm: int = 4
    most_splits: int = 32
    least_steps: int = 4


Tile = LinearTile | ShrinkTile | ReduceTile


@dataclass(frozen=True)
class Key:
    """What a table is asked: M in buckets of powers of two, the dtype by its name in Triton, r padded to its block.

    terms: products or low-rank terms of the call; dropout: whether one is masked; tma: whether operands are described.
    """

    op: str
    capability: int
    dtype: str
    N: int
    K: int
    r: int
    bucket: int
    terms: int = 1
    dropout: bool = False
    tma: bool = False


@dataclass(frozen=True)
class Tuned:
    """A tile that was measured, in seconds beside those of the default; ``dropped``: candidates that were not timed,
    and why."""

    tile: Tile
    seconds: float
    default_seconds: float
    dropped: dict[str, str] = field(default_factory=dict)


MOST_RANKS = 256
"""Most columns of one accumulator: the ranks, padded, of the terms that share one read of the big operand."""


def block_of_rank(r: int, most: int = MOST_RANKS) -> int:
    """The block that holds rank ``r``: a power of two, 16 at least as matmuls need, ``most`` at most."""
    return min(max(16, 1 << (r - 1).bit_length()), most)


def bucket(M: int) -> int:
    """0 up to 16 rows, then one bucket for every doubling, up to 10 for more than 8192."""
    return min(max((M - 1).bit_length() - 4, 0), 10) if M > 0 else 0


def rows_of(bucket: int) -> tuple[int, int]:
    """The fewest and the most rows of a bucket; of the last, which is open, the most that are measured."""
    return (1 if bucket == 0 else (8 << bucket) + 1), 16 << bucket


def look_up(key: Key, tuned: Mapping[Key, Tuned]) -> Any:
    """The tile for ``key``: the tuned one, else the default."""
    found = tuned.get(key)
    return default(key) if found is None else found.tile


@lru_cache(1024)
def default(key: Key) -> Tile:
    """The conservative tile of an op."""
    if key.op == "linear":
        return _linear(key)
    return _shrink(key) if key.op == "shrink" else _reduce(key)


def _linear(key: Key) -> LinearTile:
    if key.capability == INTERPRETER:
        return LinearTile(16, 16, 16, group_m=2)
    several_masks = key.dropout and key.terms > 2
    if key.K == 0:  # the adapter alone: the loop over tiles is the one whose loads run ahead
        return LinearTile(64, 64 if key.dropout else 128, 32, num_warps=8, num_stages=2, per_sm=2)
    if key.dtype == "fp32":
        return LinearTile(64, 32 if key.dropout and (several_masks or key.r > 32) else 64, 32, num_warps=8)
    if key.bucket <= 2:
        return LinearTile(64, 64 if key.dropout else 128, 64, num_warps=4, num_stages=3, per_sm=2)
    if key.dropout:  # masks cost registers: each is made for the whole tile at once
        return LinearTile(128, 64 if several_masks else 128, 64 if key.tma else 32, num_warps=8, num_stages=4)
    if key.tma and (key.terms == 1 or key.r <= 32):
        return LinearTile(128, 256, 64, num_warps=8)
    if key.tma:
        return LinearTile(128, 128, 64, num_warps=8, num_stages=4)
    return LinearTile(128, 128, 32, num_warps=8, num_stages=4)


def _shrink(key: Key) -> ShrinkTile:
    if key.capability == INTERPRETER:
        return ShrinkTile(16, 16, least_steps=2)
    if key.dtype == "fp32":
        return ShrinkTile(32, 32) if key.r <= 64 else ShrinkTile(32, 16, num_warps=8)
    return ShrinkTile(64, 64) if key.r <= 64 else ShrinkTile(64, 32, num_warps=8)


def _reduce(key: Key) -> ReduceTile:
    if key.capability == INTERPRETER:
        return ReduceTile(16, 16, least_steps=2)
    if key.dtype == "fp32":
        return ReduceTile(32, 32, num_warps=4 if key.r <= 64 else 8)
    return ReduceTile(64, 64) if key.r <= 64 else ReduceTile(32, 64, num_warps=8)


NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The dtypes the kernels take, by their names in Triton."""


def key_of(
    op: str,
    capability: int,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    r: int,
    terms: int = 1,
    dropout: bool = False,
    tma: bool = False,
) -> Key:
    """The key of a call."""
    return _key(op, capability, dtype, N, K, r, bucket(M), terms, dropout, tma)


@lru_cache(1024)  # it is asked for at every launch
def _key(op: str, capability: int, dtype: torch.dtype, *rest: Any) -> Key:
    return Key(op, capability, NAMES[dtype], *rest)
