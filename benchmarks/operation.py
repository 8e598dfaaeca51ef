"""What run.py must know of an operation to measure it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from roofline import Floor


@dataclass(frozen=True)
class Operation:
    """``yardstick``: the contestant over whose time those of all are reported; ``ours``: those held to our own rules, and
    compared with everybody; ``slow``: what a quick run leaves out. The functions are those of the operation's module."""

    name: str
    yardstick: str
    ours: tuple[str, ...]
    cpu_points: tuple[Any, ...]
    gpu_points: tuple[Any, ...]
    builders: Mapping[str, Callable[..., Any]]
    make_problem: Callable[[Any, torch.device], Any]
    truths: Callable[[Any], Mapping[str, torch.Tensor]]
    check: Callable[[str, Any, Mapping[str, torch.Tensor]], Any]
    why_not: Callable[[str, Any, torch.device], str | None]
    floor: Callable[[Any, str], Floor]
    slow: tuple[str, ...]

    def points(self, device: torch.device) -> tuple[Any, ...]:
        """The named points of a device."""
        return self.gpu_points if device.type == "cuda" else self.cpu_points
