"""How a kernel is declared for compilation ahead of time, in the forms the launchers call it in."""

from __future__ import annotations

from typing import Any

from ...declared import Compilation, Expects
from .tiles import LinearTile, ReduceTile, ShrinkTile, Tile, default, key_of

UNALIGNED = ("M", "steps", "splits", "tiles_of_A")
"""Integers that take any value."""


def form(
    kernel: Any,
    arguments: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    expects: Expects = Expects(),
    architectures: tuple[int, ...] = (80, 90),
) -> Compilation:
    """``arguments``: a type as Triton writes it, a constant, or a tuple of these, for each argument of ``kernel``."""
    signature = {k: v for k, v in arguments.items() if isinstance(v, tuple) or _is_type(v)}
    constants = {k: v for k, v in arguments.items() if k not in signature}
    unaligned = tuple(name for name in UNALIGNED if name in signature)
    return Compilation(kernel, signature, constants, num_warps, num_stages, expects, unaligned, architectures)


def _is_type(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("*", "i32", "tensordesc"))


def row_major(name: str, rows: str, columns: str) -> dict[str, Any]:
    """The strides of a matrix whose rows are contiguous."""
    return {f"stride_{name}{rows}": "i32", f"stride_{name}{columns}": 1}


__all__ = ["LinearTile", "ReduceTile", "ShrinkTile", "Tile", "default", "form", "key_of", "row_major"]
