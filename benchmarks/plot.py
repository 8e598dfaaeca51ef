"""Draw a results file: time over the yardstick's at every point, and peak memory; a picture an operation.

python benchmarks/plot.py benchmarks/results/NAME.json [--op NAME] [--output NAME.png] [--contestants ours,peft]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import results
from operation import Operation
from registry import OPERATIONS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "ours": "#0b6e4f",
    "ours_clora": "#6bbf59",
    "ours_aten": "#6bbf59",
    "ours_triton": "#2f9c95",
    "ours_reference": "#e8985e",
    "peft": "#c1440e",
    "peft_16bit": "#e8985e",
    "cholesky_qr2": "#c1440e",
    "copy": "#bbbbbb",
}


def draw(content: dict[str, Any], path: Path, operation: Operation, only: list[str] | None = None) -> None:
    """Two panels, one bar a contestant and point: time of forward and backward over the yardstick's (whiskers: 20th to
    80th percentile; line: the floor), and MiB. Raises ValueError if nothing was measured of the operation, for anybody
    or for one of ``only``."""
    rows = [row for row in content["rows"] if row["operation"] == operation.name and "skipped" not in row]
    if not rows:
        raise ValueError(f"the file holds no measured row of {operation.name}")
    yardstick, memory_key = operation.yardstick, operation.memory_key
    known = dict.fromkeys(row["contestant"] for row in rows)
    if unknown := [w for w in only or () if w not in known]:
        raise ValueError(f"contestants: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    names = list(dict.fromkeys(row["point"]["name"] for row in rows))
    who = [w for w in known if w != yardstick and (not only or w in only)]
    by_key = {(row["point"]["name"], row["contestant"]): row for row in rows}
    figure, (time_axis, memory_axis) = plt.subplots(2, 1, figsize=(max(8, 0.55 * len(names) + 3), 8.5), sharex=True)
    width = 0.8 / max(len(who), 1)
    for i, contestant in enumerate(who):
        have = [(at, by_key[name, contestant]) for at, name in enumerate(names) if (name, contestant) in by_key]
        x = [at - 0.4 + (i + 0.5) * width for at, _ in have]
        ratios = [row["ratio_to"][yardstick]["both"] for _, row in have]
        medians = [ratio["median"] for ratio in ratios]
        below = [max(ratio["median"] - ratio["p20"], 0.0) for ratio in ratios]
        above = [max(ratio["p80"] - ratio["median"], 0.0) for ratio in ratios]
        style = {"width": width, "color": COLOURS.get(contestant), "label": contestant}
        time_axis.bar(x, medians, yerr=[below, above], error_kw={"lw": 0.7, "ecolor": "#444444"}, **style)
        memory_axis.bar(x, [(row[memory_key] or 0) / 2**20 for _, row in have], **style)
    for at, name in enumerate(names):
        if (name, "ours") in by_key and (name, yardstick) in by_key:
            floor = by_key[name, "ours"]["floor_seconds"]["both"] / by_key[name, yardstick]["seconds"]["both"]["median"]
            label = "floor" if at == 0 else None
            time_axis.plot([at - 0.42, at + 0.42], [floor, floor], color="black", lw=1.2, label=label)
    time_axis.axhline(1.0, color="#888888", lw=0.8, ls="--")
    time_axis.set_yscale("log")
    time_axis.set_ylabel(f"forward + backward,\ntime / {operation.yardstick_label}")
    memory_axis.set_yscale("symlog", linthresh=0.1)
    memory_axis.set_ylabel(f"{operation.memory_label}, MiB")
    memory_axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    time_axis.legend(ncols=4, fontsize=8)
    s = content["stamp"]
    commit = f"{s['commit']}{' with changes' if s['dirty'] else ''}"
    where = f"{s['device']}, {s['threads']} CPU threads, torch {s['torch']}, commit {commit}"
    time_axis.set_title(f"{operation.name}: {where}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--op", choices=OPERATIONS, help="one operation (default: all that the file has)")
    parser.add_argument("--output", type=Path, help="PNG file (default: beside the results)")
    parser.add_argument("--contestants", help="comma-separated; by default all")
    arguments = parser.parse_args()
    path = arguments.output or arguments.results.with_suffix(".png")
    only = arguments.contestants.split(",") if arguments.contestants else None
    try:
        content = results.read(arguments.results)
        names = [arguments.op] if arguments.op else list(dict.fromkeys(row["operation"] for row in content["rows"]))
        if not names:
            raise ValueError("the file holds no measured row")
        for name in names:
            own = path if len(names) == 1 else path.with_stem(f"{path.stem}-{name}")
            draw(content, own, OPERATIONS[name], only)
            print(own)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
