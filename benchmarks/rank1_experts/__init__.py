"""Rank-1 experts as an operation that is measured: over the time of the form that copies the chosen rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from operation import Operation

from .checks import check, truths
from .contestants import BUILDERS, OURS, make_problem, why_not
from .floor import floor
from .points import CPU_POINTS, GPU_POINTS


def _traffic(row: Mapping[str, Any]) -> str:
    """What a copy moves in the time of forward and backward, over the bytes of the floor."""
    return f"{row['traffic']['both']:.2f}"


OPERATION = Operation(
    name="rank1_experts",
    cpu_points=CPU_POINTS,
    gpu_points=GPU_POINTS,
    builders=BUILDERS,
    yardstick="gather",
    yardstick_label="the eager gather",
    ours=tuple(OURS),
    make_problem=make_problem,
    truths=truths,
    check=check,
    floor=floor,
    why_not=why_not,
    note=_traffic,
    note_heading="traffic",
    bounds=("outputs",),
    slow=("gather_compiled",),
    memory_above="outputs",
)
