"""Measure operations against their yardsticks and others, at named points.

    python benchmarks/run.py                       every operation, every point of the device at hand
    python benchmarks/run.py --op gram_schmidt     one operation
    python benchmarks/run.py --quick               the quick points, in 90 seconds
    python benchmarks/run.py --points vit-q-bf16   some points (names: benchmarks/*/points.py)
    python benchmarks/run.py --resume FILE         go on where FILE was left
    python benchmarks/run.py --gpu-suite           build, test, measure and tune on a GPU in 9 minutes
    python benchmarks/run.py --gpu-suite --device cpu    the same command in short form, without a GPU

A point is measured after its results were checked (benchmarks/*/checks.py). Results go to stdout and, after every
point, to benchmarks/results/*.json and *.csv; benchmarks/plot.py draws them. Columns: milliseconds; time over the
yardstick's, within each round; the part of the floor's time (roofline.py) that was reached; peak memory; and
alpha (the share of the adapter in the output), traffic (bytes a copy moves in the time, over those of two passes), how
many values are trained, or tokens a second and launches.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import results
import torch
from operation import Operation
from registry import CONTESTANTS, OPERATIONS, Selection, select
from roofline import Ceilings, measure_ceilings

from clora_kernels.testing import Spread, take_turns
from clora_kernels.testing.timing import peak_bytes

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure_point(
    operation: Operation,
    point: Any,
    names: list[str],
    device: torch.device,
    ceilings: Ceilings,
    seconds: float,
    clock: str,
) -> list[results.Row]:
    """A row for each contestant of a point; those that cannot take part, or failed their check, say why."""
    described = {**asdict(point), "dtype": str(point.dtype).removeprefix("torch.")}
    yardstick = operation.yardstick
    problem = operation.make_problem(point, device)
    truth = operation.truths(problem)
    running: dict[str, Any] = {}
    verdicts: dict[str, Any] = {}
    rows: list[results.Row] = []
    for name in names:
        reason = operation.why_not(name, point, device)
        if reason is None:
            try:
                verdicts[name] = operation.check(name, problem, truth)
                running[name] = operation.builders[name](problem)
            except Exception as error:  # a contestant that fails is a finding of the run, not its end
                if name in operation.ours or name == yardstick:
                    raise
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if reason is not None:
            rows.append({"operation": operation.name, "point": described, "contestant": name, "skipped": reason})
    del truth
    turns = {name: (c.forward, c.backward) for name, c in running.items()}
    rounds = take_turns(turns, device, seconds, clock=CLOCKS[clock])
    peaks = {name: peak_bytes(c.forward, c.backward, device) for name, c in running.items()}
    for name in running:
        floor = operation.floor(name, point)
        floor_seconds, moved = floor.seconds(ceilings, point.dtype), floor.as_json()
        others = list(running) if name in operation.ours else [yardstick]
        spreads = {part: asdict(Spread.of(values)) for part, values in rounds[name].parts().items()}
        row = {
            "operation": operation.name,
            "point": described,
            "contestant": name,
            "rounds": len(rounds[name].forward),
            "seconds": spreads,
            "ratio_to": {
                other: {part: asdict(spread) for part, spread in rounds[name].ratios(rounds[other]).items()}
                for other in others
                if other != name or name == yardstick
            },
            "floor": moved,
            "floor_seconds": floor_seconds,
            "floor_reached": {part: floor_seconds[part] / spreads[part]["median"] for part in spreads},
            "traffic": {
                part: spreads[part]["median"] * ceilings.bytes_per_second / moved[part]["bytes"] for part in spreads
            },
            "peak_bytes": peaks[name],
            **asdict(verdicts[name]),
        }
        if base := operation.memory_above:
            row[operation.memory_key] = None if name == base else peaks[name] - peaks[base]
        rows.append(row)
    order = {name: i for i, name in enumerate(names)}
    return sorted(rows, key=lambda row: order[row["contestant"]])


def run(arguments: argparse.Namespace, device: torch.device, selections: list[Selection]) -> int:
    path, content = opened(arguments, device)
    content["stamp"]["clock"] = "events" if device.type == "cuda" else arguments.clock
    done = {(row["operation"], row["point"]["name"]) for row in content["rows"]}
    dtypes = [torch.bfloat16, torch.float32, *(point.dtype for selection in selections for point in selection.points)]
    ceilings = measure_ceilings(device, tuple(dict.fromkeys(dtypes)), CLOCKS[arguments.clock])
    content["ceilings"].append(ceilings.as_json())
    s = content["stamp"]
    print(f"{s['device']}, {s['threads']} threads, torch {s['torch']}, commit {s['commit']}{'+' if s['dirty'] else ''}")
    print(f"ceilings: {ceilings}")
    deadline = time.monotonic() + arguments.limit if arguments.limit else float("inf")
    for selection in selections:
        operation, names = selection.operation, selection.contestants
        print(f"\n{operation.name}, over {operation.yardstick_label}\n{results.header(operation)}")
        for point in selection.points:
            if (operation.name, point.name) in done:
                continue
            if time.monotonic() > deadline:
                print(f"the time is up: {point.name} and what follows was not measured; --resume {path} goes on")
                break
            rows = measure_point(operation, point, names, device, ceilings, arguments.seconds, arguments.clock)
            content["rows"] += rows
            results.save(path, content)
            print(f"\n{point}\n{results.table(rows, operation)}", flush=True)
        print()
        for contestant in filter(names.__contains__, operation.ours):
            for baseline in (name for name in names if name not in operation.ours):
                if told := results.against(content["rows"], operation, baseline, contestant):
                    print(told)
    print(f"\nsaved: {path} and {path.with_suffix('.csv').name}")
    return 0


def opened(arguments: argparse.Namespace, device: torch.device) -> tuple[Path, dict[str, Any]]:
    """The file of the results and what it holds already."""
    stamp = results.stamp(device)
    if arguments.resume:
        path = Path(arguments.resume)
        if path.exists():
            try:
                content = results.read(path)
            except ValueError as error:
                raise SystemExit(f"--resume {error}") from None
            fixed = ("commit", "dirty", "device", "torch", "threads")
            changed = [k for k in fixed if content["stamp"].get(k) != stamp[k]]
            if changed:
                raise SystemExit(
                    f"--resume {path}: it was measured with another {', '.join(changed)}; start a new file"
                )
            return path, content
    else:
        kind = "quick" if arguments.quick else "some" if arguments.points else "all"
        when = stamp["date"].replace(":", "").replace("-", "")[:15]
        path = Path(arguments.output or results.ROOT / "benchmarks" / "results" / f"{device.type}-{kind}-{when}.json")
    return path, {"stamp": stamp, "ceilings": [], "rows": []}


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--op", choices=OPERATIONS, help="one operation (default: all)")
    parser.add_argument("--quick", action="store_true", help="the quick points, with less time for each")
    parser.add_argument("--points", help="comma-separated names of points")
    parser.add_argument("--contestants", help=f"comma-separated, yardsticks beside: {', '.join(CONTESTANTS)}")
    parser.add_argument("--seconds", type=float, help="time to measure each point (default 6; quick 2)")
    parser.add_argument("--limit", type=float, help="seconds after which no further point is begun")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time, for one thread on a machine others use too",
    )
    parser.add_argument("--output", help="file of the results (default: benchmarks/results/...json)")
    parser.add_argument("--resume", help="file of an earlier run to go on with; made if it is not there")
    parser.add_argument("--gpu-suite", action="store_true", help="build, test, measure and tune in one command")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = parser_of_arguments()
    arguments = parser.parse_args(argv)
    if arguments.seconds is None:
        arguments.seconds = 2.0 if arguments.quick else 6.0
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch finds no CUDA device here")
        torch.empty(0, device=device)
    except RuntimeError as error:
        parser.error(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: got {device}, expected cpu or cuda")
    for name in ("seconds", "threads", "limit"):
        if (value := getattr(arguments, name)) is not None and not value > 0:
            parser.error(f"--{name}: got {value}, expected more than 0")
    try:
        selections = select(device, arguments.op, arguments.points, arguments.contestants, arguments.quick)
    except ValueError as error:
        parser.error(f"--{error}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="(torch|peft)")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT asks it by old names
    if arguments.gpu_suite:
        from suite import run_suite

        return run_suite(device)
    return run(arguments, device, selections)


if __name__ == "__main__":
    sys.exit(main())
