"""Results of a run: stamped, saved after every point, read back to go on; as tables and CSV."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import environment  # noqa: F401
import torch
from operation import Operation

import clora_kernels

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("forward", "backward", "both")
Row = dict[str, Any]


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def stamp(device: torch.device) -> dict[str, Any]:
    """What the figures depend on: commit and whether the tree differs from it, device, threads, versions."""
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD") or None,
        "dirty": bool(_git("status", "--porcelain", "--", "clora_kernels", "csrc", "benchmarks/*.py", "setup.py")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": _device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "clora_kernels": clora_kernels.__version__,
        **{name: _version(name) for name in ("torch", "triton", "peft")},
    }


def read(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote. Raises ValueError, naming the file, where it is not there or holds something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict) or not {"stamp", "ceilings", "rows"} <= content.keys():
        raise ValueError(f"{path}: got a file of something else, expected results that benchmarks/run.py wrote")
    for row in content["rows"]:
        row.setdefault("operation", "routed_lora")  # once the only one
    return content


def save(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, and the rows as CSV beside it, each at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(content, indent=1) + "\n")
    flat = [flatten(row) for row in content["rows"]]
    if flat:
        columns = list(dict.fromkeys(column for row in flat for column in row))
        beside = path.with_suffix(".csv.part")
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(flat)
        beside.replace(path.with_suffix(".csv"))


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    part.replace(path)


def flatten(row: Row, prefix: str = "") -> Row:
    """Nested keys joined by dots."""
    flat: Row = {}
    for key, value in row.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def header(operation: Operation) -> str:
    """What the columns of :func:`table` are."""
    ratio = f"time / {operation.yardstick}: fwd, bwd, both (p20-p80)"
    times = f"{'':<14}{'forward':>10}{'backward':>10}{'both':>10}"
    return f"{times}  {ratio:<42}{'of floor':>9}{'peak MiB':>10}{operation.note_heading:>9}"


def table(rows: list[Row], operation: Operation) -> str:
    """One line a contestant of a point: milliseconds, ratios to the yardstick, part of the floor, memory, the note."""
    return "\n".join(_line(row, operation) for row in rows)


def _line(row: Row, operation: Operation) -> str:
    if "skipped" in row:
        return f"{row['contestant']:<14}{row['skipped']}"
    ms = "".join(f"{row['seconds'][part]['median'] * 1e3:>10.3f}" for part in PARTS)
    ratio = row["ratio_to"][operation.yardstick]
    spread = f"({ratio['both']['p20']:.3f}-{ratio['both']['p80']:.3f})"
    ratios = "".join(f"{ratio[part]['median']:>7.3f}" for part in PARTS)
    peak = row[operation.memory_key]
    memory = "" if peak is None else f"{peak / 2**20:.2f}"
    reached = f"{row['floor_reached']['both']:.2f}"
    return f"{row['contestant']:<14}{ms}  {ratios + ' ' + spread:<42}{reached:>9}{memory:>10}{operation.note(row):>9}"


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def against(rows: list[Row], operation: Operation, baseline: str, contestant: str = "ours") -> str:
    """Time and memory of a contestant over a baseline's at all points that have both: means, extremes, the slower.
    Empty where no point has both."""
    measured = [row for row in rows if row["operation"] == operation.name and "skipped" not in row]
    by_key = {(row["point"]["name"], row["contestant"]): row for row in measured}
    names = [name for name, who in by_key if who == baseline and (name, contestant) in by_key]
    if not names:
        return ""
    mine = {name: by_key[name, contestant] for name in names}
    ratios = {part: {name: row["ratio_to"][baseline][part] for name, row in mine.items()} for part in PARTS}
    medians = {part: [ratio["median"] for ratio in of.values()] for part, of in ratios.items()}
    means = ", ".join(f"{part} {_mean(values)}" for part, values in medians.items())
    slowest = max(names, key=lambda name: ratios["both"][name]["median"])
    lines = [
        f"{contestant} / {baseline}, {len(names)} points: time, geometric mean: {means}; "
        f"largest {ratios['both'][slowest]['median']:.3f} ({slowest})"
    ]
    counting = [name for name in names if operation.counts(mine[name]["point"])]
    for part in () if baseline in operation.bounds else ("forward", "both"):
        told = [_slower(ratios[part], counting, operation.counted)]
        if others := [name for name in names if name not in counting]:
            told.append(_slower(ratios[part], others, " others"))
        lines.append(f"  slower, {part}, beyond the spread (20th percentile of the ratio above 1): {'; '.join(told)}")
    memory = {
        name: row[operation.memory_key] / theirs
        for name, row in mine.items()
        if (theirs := by_key[name, baseline][operation.memory_key] or 0) > 0
    }
    if memory:
        worst = max(memory, key=memory.__getitem__)
        lines.append(
            f"  memory, {operation.memory_label}: geometric mean "
            f"{geometric_mean([max(m, 1e-3) for m in memory.values()]):.3f}, largest {memory[worst]:.3f} ({worst})"
        )
    return "\n".join(lines)


def _slower(ratios: Mapping[str, Row], names: list[str], what: str) -> str:
    some = [f"{name} {ratios[name]['median']:.3f}" for name in names if ratios[name]["p20"] > 1]
    return f"{len(some)} of {len(names)}{what}" + (f": {', '.join(some)}" if some else "")


def _mean(ratios: list[float]) -> str:
    mean = geometric_mean(ratios)
    return f"{mean:.3f}" + (f" ({1 / mean:.2f}x faster)" if mean < 1 else "")
