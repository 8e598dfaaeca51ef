"""The training step of the continual-learning methods as an operation that is measured: over the time of the frozen
model's forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from operation import Operation

from .checks import check, truths
from .contestants import BUILDERS, OURS, make_problem, why_not
from .floor import floor
from .points import CPU_POINTS, GPU_POINTS


def _trained(row: Mapping[str, Any]) -> str:
    """How many values learn, in thousands, without the head's."""
    return "" if row["trained"] is None else f"{row['trained'] / 1e3:.0f}k"


OPERATION = Operation(
    name="continual",
    cpu_points=CPU_POINTS,
    gpu_points=GPU_POINTS,
    builders=BUILDERS,
    yardstick="frozen",
    yardstick_label="the frozen model",
    ours=tuple(OURS),
    make_problem=make_problem,
    truths=truths,
    check=check,
    floor=floor,
    note=_trained,
    note_heading="trained",
    bounds=("frozen",),
    why_not=why_not,
    memory_above="frozen",
)
