"""What the commands must know of an operation to measure it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from roofline import Floor


@dataclass(frozen=True)
class Operation:
    """Points have a ``name``, a ``dtype`` and whether they are ``quick``; builders make contestants, with ``forward()``
    and ``backward(y)``, of a problem; a check gives a record of figures, or raises.

    Attributes:
        yardstick: the contestant over whose time those of all are reported; ``yardstick_label`` in words.
        ours: contestants that are held to our own rules and compared with everybody.
        bounds: contestants that do less than the operation: how much slower ours is than those is told, not where.
        slow: contestants that a quick run leaves out.
        memory_above: the contestant above whose peak memory others are reported; None: memory is reported whole.
        note, note_heading: the last column of the table, of a row of the results.
        counts, counted: whether being slower at a point counts, and what those points are called.
        needs: packages without which nothing of it can be measured.
    """

    name: str
    cpu_points: tuple[Any, ...]
    gpu_points: tuple[Any, ...]
    builders: Mapping[str, Callable[[Any], Any]]
    yardstick: str
    yardstick_label: str
    ours: tuple[str, ...]
    make_problem: Callable[[Any, torch.device], Any]
    truths: Callable[[Any], Mapping[str, torch.Tensor]]
    check: Callable[[str, Any, Mapping[str, torch.Tensor]], Any]
    floor: Callable[[str, Any], Floor]
    note: Callable[[Mapping[str, Any]], str]
    note_heading: str
    bounds: tuple[str, ...]
    why_not: Callable[[str, Any, torch.device], str | None] = lambda name, point, device: None
    slow: tuple[str, ...] = ()
    memory_above: str | None = None
    counts: Callable[[Mapping[str, Any]], bool] = lambda point: True
    counted: str = ""
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]

    def points(self, device: torch.device) -> tuple[Any, ...]:
        """The named points of a device, most important first."""
        return self.gpu_points if device.type == "cuda" else self.cpu_points

    @property
    def memory_key(self) -> str:
        """Where a row holds the bytes that are reported."""
        return "peak_bytes" if self.memory_above is None else f"peak_above_{self.memory_above}_bytes"

    @property
    def memory_label(self) -> str:
        return "peak" if self.memory_above is None else f"peak above {self.memory_above}"
