"""The tiles that tuning tries: a short, declared list for each kind of call, the default first.

They are guesses, and may be: what does not compile, needs more shared memory than the chip has, spills or computes
wrongly is dropped before it is timed.
"""

from __future__ import annotations

from dataclasses import replace

from .tiles import INTERPRETER, Key, LinearTile, ReduceTile, ShrinkTile, Tile, default


def candidates(key: Key) -> list[Tile]:
    """The tiles to try for ``key``, none twice."""
    first = default(key)
    if isinstance(first, LinearTile):
        others = _linear(key, first)
    else:
        others = _shrink(key, first) if isinstance(first, ShrinkTile) else _reduce(key, first)
    return list(dict.fromkeys([first, *others]))


def _linear(key: Key, first: LinearTile) -> list[Tile]:
    if key.capability == INTERPRETER:
        return [LinearTile(32, 16, 16, group_m=2)]
    if key.dtype == "fp32":  # no tensor cores: an accumulator of 64 × 64 fills the registers of 8 warps
        shapes = [(64, 64, 16, 8, 3), (32, 64, 32, 4, 3), (64, 32, 32, 4, 3), (32, 32, 32, 4, 4), (16, 64, 32, 4, 4)]
    elif key.bucket <= 2:  # one block of rows: the weight is read once whatever the tile, so many columns in flight
        rows = 16 << key.bucket
        shapes = [(rows, 64, 128, 4, 4), (rows, 128, 64, 4, 4), (rows, 128, 128, 4, 3), (rows, 32, 128, 4, 5)]
        shapes.append((64, 64, 64, 4, 4))
    else:
        shapes = [(128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4)]
        if not key.dropout:  # a mask beside a larger accumulator spills
            shapes += [(128, 128, 64, 4, 4), (64, 256, 64, 8, 4)]
            shapes += [(128, 256, 64, 8, 4), (256, 128, 64, 8, 3)] if key.tma else [(128, 256, 32, 8, 3)]
    tiles = [LinearTile(m, n, k, warps, stages) for m, n, k, warps, stages in shapes]
    if key.bucket <= 2:
        return [replace(tile, per_sm=2) for tile in tiles]
    small = [replace(tile, per_sm=2) for tile in tiles if tile.block_m * tile.block_n <= 128 * 64]
    return [*tiles, *small, replace(first, group_m=16)]


def _shrink(key: Key, first: ShrinkTile) -> list[Tile]:
    if key.capability == INTERPRETER:
        return [ShrinkTile(32, 16, least_steps=2)]
    shapes = [(32, 64, 4, 4), (64, 64, 4, 4), (64, 32, 4, 4), (128, 32, 4, 3), (16, 64, 4, 4)]
    if key.dtype != "fp32" and key.r <= 64:
        shapes += [(64, 128, 4, 3), (32, 128, 4, 4), (128, 64, 8, 3), (16, 128, 4, 4)]
    tiles = [ShrinkTile(m, k, warps, stages) for m, k, warps, stages in shapes]
    return [*tiles, replace(first, per_sm=2), replace(first, per_sm=8), replace(first, per_sm=8, most_splits=64)]


def _reduce(key: Key, first: ReduceTile) -> list[Tile]:
    if key.capability == INTERPRETER:
        return [ReduceTile(32, 16, least_steps=2)]
    shapes = [(32, 64, 4, 4), (64, 64, 4, 4), (64, 32, 4, 4), (32, 128, 8, 3)]
    if key.dtype != "fp32" and key.r <= 64:
        shapes += [(128, 64, 4, 3), (64, 128, 4, 3)]
    tiles = [ReduceTile(m, k, warps, stages) for m, k, warps, stages in shapes]
    return [*tiles, replace(first, per_sm=2), replace(first, per_sm=8), replace(first, per_sm=8, most_splits=64)]
