"""Routed LoRA as an operation that is measured: over the time of the frozen linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from operation import Operation

from .checks import check, truths
from .contestants import BUILDERS, OURS, make_problem, why_not
from .floor import floor
from .points import CPU_POINTS, GPU_POINTS


def _alpha(row: Mapping[str, Any]) -> str:
    """The share of the adapter that came through, marked where that is not all of it."""
    return "" if row["alpha"] is None else f"{row['alpha']:.3f}" + ("" if row["faithful"] else "!")


OPERATION = Operation(
    name="routed_lora",
    cpu_points=CPU_POINTS,
    gpu_points=GPU_POINTS,
    builders=BUILDERS,
    yardstick="frozen",
    yardstick_label="the frozen layer",
    ours=tuple(OURS),
    make_problem=make_problem,
    truths=truths,
    check=check,
    floor=floor,
    note=_alpha,
    note_heading="alpha",
    bounds=("frozen",),
    why_not=why_not,
    slow=("peft_compiled",),
    memory_above="frozen",
)
