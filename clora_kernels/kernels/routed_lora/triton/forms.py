"""How kernels are declared for compilation ahead of time: in the forms, and with the tiles, the launchers use."""

from __future__ import annotations

from typing import Any

from ...declared import Compilation, Expects
from ..tiles import Key, LinearTile, ReduceTile, ShrinkTile, default

UNALIGNED = ("M", "steps", "splits", "tiles_of_A")
"""Integers that take any value; sizes, ranks and strides are compiled as multiples of 16."""


def form(
    kernel: Any,
    arguments: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    expects: Expects | None = None,
    architectures: tuple[int, ...] = (80, 90),
) -> Compilation:
    """``arguments``: a type as Triton writes it, a constant, or a tuple of these, for each argument of ``kernel``."""
    signature = {k: v for k, v in arguments.items() if isinstance(v, tuple) or _is_type(v)}
    constants = {k: v for k, v in arguments.items() if k not in signature}
    unaligned = tuple(name for name in UNALIGNED if name in signature)
    return Compilation(
        kernel, signature, constants, num_warps, num_stages, expects or Expects(), unaligned, architectures
    )


def _is_type(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("*", "i32", "fp32", "tensordesc"))


def tile_for(op: str, capability: int, dtype: str, r: int, **key: Any) -> Any:
    """The default tile of a large call on an architecture."""
    return default(Key(op, capability, dtype, 4096, r=r, **{"K": 4096, "bucket": 9, **key}))


def tiled(tile: LinearTile | ShrinkTile | ReduceTile, architecture: int, expects: Expects) -> dict[str, Any]:
    """The options of ``form`` that a tile decides."""
    options: dict[str, Any] = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return {**options, "architectures": (architecture,), "expects": expects}
