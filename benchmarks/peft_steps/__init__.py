"""Steps of whole PEFT models as an operation that is measured: training with LoRA, generating with a cache, over the
time of PEFT's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from operation import Operation

from .checks import check, truths
from .contestants import BUILDERS, OURS, make_problem, why_not
from .floor import floor
from .points import CPU_POINTS, GPU_POINTS, tokens_of


def _told(row: Mapping[str, Any]) -> str:
    """Tokens a second, and what one forward and backward launches."""
    launches = "" if row["launches"] is None else row["launches"]
    return f"{tokens_of(row['point']) / row['seconds']['both']['median']:>12.0f}{launches:>10}"


OPERATION = Operation(
    name="peft",
    cpu_points=CPU_POINTS,
    gpu_points=GPU_POINTS,
    builders=BUILDERS,
    yardstick="peft",
    yardstick_label="PEFT in eager mode",
    ours=tuple(OURS),
    make_problem=make_problem,
    truths=truths,
    check=check,
    floor=floor,
    note=_told,
    note_heading=f"{'tokens/s':>12}{'launches':>10}",
    bounds=(),
    why_not=why_not,
    slow=("peft_compiled", "ours_compiled"),
    needs=("peft", "transformers"),
)
