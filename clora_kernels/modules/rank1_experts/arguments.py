"""Checks of what constructors and forward get."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from ...autograd.routed_lora.arguments import check_x
from ...library import autocast_is_on


def check_count(name: str, value: Any, most: int | None = None) -> int:
    """``value`` as an int; ValueError unless it is one of at least 1, and at most ``most``, the experts of the pool."""
    is_int = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_int or value < 1 or (most is not None and value > most):
        expected = "an int of at least 1" if most is None else f"an int from 1 to {most}, the number of experts"
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return operator.index(value)


def check_name(name: str, value: Any, known: tuple[str, ...]) -> None:
    """ValueError unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, known))}")


def check_rows(x: Any, in_features: int, weight: Tensor | None = None) -> None:
    """Raise unless x is ``[..., in_features]``, on the device of ``weight`` and in a dtype that meets it."""
    check_x(x)
    if x.shape[-1] != in_features:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., {in_features}] = [..., in_features]")
    if weight is None:
        return
    if x.device != weight.device:
        raise ValueError(f"x: got device {x.device}, expected {weight.device}, the device of weight")
    if x.dtype != weight.dtype and not autocast_is_on(x):
        raise TypeError(f"x: got dtype {x.dtype}, expected {weight.dtype}, the dtype of weight")
