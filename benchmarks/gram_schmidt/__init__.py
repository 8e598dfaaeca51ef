"""Gram-Schmidt as an operation that is measured: over the time of ``torch.linalg.qr``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from operation import Operation

from .checks import check, truths
from .contestants import BUILDERS, OURS, make_problem, why_not
from .floor import floor
from .points import CPU_POINTS, GPU_POINTS


def _traffic(row: Mapping[str, Any]) -> str:
    """What a copy moves in the time of forward, over the bytes of two passes."""
    return f"{row['traffic']['forward']:.2f}"


OPERATION = Operation(
    name="gram_schmidt",
    cpu_points=CPU_POINTS,
    gpu_points=GPU_POINTS,
    builders=BUILDERS,
    yardstick="qr",
    yardstick_label="torch.linalg.qr",
    ours=tuple(OURS),
    make_problem=make_problem,
    truths=truths,
    check=check,
    floor=floor,
    why_not=why_not,
    note=_traffic,
    note_heading="traffic",
    bounds=("copy",),
    counts=lambda point: point["B"] * point["d"] * point["r"] >= 100_000,
    counted=" with B·d·r >= 1e5",
)
