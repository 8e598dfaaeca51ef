"""C-LoRA against LoRA on scikit-learn's digits: python examples/compare_on_digits.py [--seeds N] [--repeats R] [--tune]

A small vision transformer, pretrained on four digits, learns the other six two at a time; then it is asked about all
six. Prints a table, proves the accelerated layers on that very model, and writes pictures and numbers into a folder.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

# Else every profiled step says that it starts and stops, and warns of memory from before it, across the progress bars.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from digits import HIDDEN, Run, Settings, Stream, batches, classify, learn, make_optimizer, make_stream, mean_of, run
from digits import StepMeter as Meter

from clora_kernels.continual import CLoRA, CosineHead, SequentialLoRA, vit_targets
from clora_kernels.continual.extras import require
from clora_kernels.continual.metrics import METRICS, Estimate, paired_table, summaries, summary, table
from clora_kernels.continual.parity import assert_model_parity
from clora_kernels.continual.plots import plot_accuracy_over_tasks, plot_forgetting_against_learning

HERE = Path(__file__).resolve().parent
TUNED = HERE / "results" / "digits_tuned.json"
PUBLISHED, ENOUGH = HERE / "results" / "digits.json", 10
TUNING_SEEDS = tuple(range(100, 106))
COMMAND = "python examples/compare_on_digits.py --tune"
RANK, TARGETS = 8, vit_targets(("q", "v", "fc1", "fc2"))

RATES, SCALES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1), (2.5, 5.0, 10.0)
SGD_GRID = [Settings("sgd", lr, scale) for scale in SCALES for lr in RATES]
LORA_GRID = [*SGD_GRID, *(Settings("adamw", lr, scale) for scale in SCALES[1:] for lr in (0.0003, 0.001))]
JOINT_GRID = [Settings("sgd", lr, scale) for scale in SCALES[1:] for lr in (0.02, 0.05, 0.1, 0.2)]


class Contestant(NamedTuple):
    """A method, how it is attached to a backbone, and the settings it is tuned over (none: it does not train)."""

    attach: Callable[..., Any]
    grid: list[Settings]
    joint: bool = False


LORA = "LoRA, task after task"
CLORA = "C-LoRA"
CONTESTANTS = {
    "frozen backbone": Contestant(functools.partial(SequentialLoRA, targets=TARGETS, r=RANK, train="never"), []),
    "LoRA, first task only": Contestant(
        functools.partial(SequentialLoRA, targets=TARGETS, r=RANK, train="first_task"), LORA_GRID
    ),
    LORA: Contestant(functools.partial(SequentialLoRA, targets=TARGETS, r=RANK), LORA_GRID),
    CLORA: Contestant(functools.partial(CLoRA, targets=TARGETS, r=RANK), SGD_GRID),
    "LoRA, all tasks jointly": Contestant(
        functools.partial(SequentialLoRA, targets=TARGETS, r=RANK), JOINT_GRID, joint=True
    ),
}


def run_contestant(stream: Stream, name: str, settings: Settings, repeat: int = 0) -> Run:
    contestant = CONTESTANTS[name]
    return run(stream, contestant.attach, settings, contestant.joint, repeat)


def in_parallel(pool: Executor, what: str, jobs: dict[Any, tuple]) -> dict[Any, Any]:
    """Results of ``jobs``, key → (function, *arguments), in the order of the jobs, with a progress bar."""
    from tqdm import tqdm

    futures = {pool.submit(*job): key for key, job in jobs.items()}
    done = {futures[f]: f.result() for f in tqdm(as_completed(futures), what, len(futures), unit="run", smoothing=0)}
    return {key: done[key] for key in jobs}


def make_streams(pool: Executor, seeds: Iterable[int]) -> dict[int, Stream]:
    return in_parallel(pool, "pretraining", {seed: (make_stream, seed) for seed in seeds})


def tune(pool: Executor) -> None:
    """Write each method's settings with the best average accuracy over the tuning seeds, and all that were tried. What
    the file has from the same seeds and versions is not tried again."""
    record: dict[str, Any] = {"command": COMMAND, "seeds": list(TUNING_SEEDS), "versions": versions(), "methods": {}}
    before = json.loads(TUNED.read_text()) if TUNED.is_file() else {}
    tried: dict[tuple[str, Settings], dict[str, Any]] = {}
    if all(before.get(k) == record[k] for k in ("seeds", "versions")):
        for name, method in before["methods"].items():
            tried |= {(name, Settings(*(t[k] for k in Settings._fields))): t for t in method["tried"]}
    wanted = [(name, settings) for name, contestant in CONTESTANTS.items() for settings in contestant.grid]
    streams = make_streams(pool, TUNING_SEEDS)
    jobs = {
        (*key, seed): (run_contestant, stream, *key)
        for key in wanted
        if key not in tried
        for seed, stream in streams.items()
    }
    runs = in_parallel(pool, "tuning", jobs)
    for name, settings in wanted:
        if (name, settings) not in tried:
            means = summaries([runs[name, settings, seed].accuracies for seed in TUNING_SEEDS])
            tried[name, settings] = {**settings._asdict(), **{m: round(means[m].mean, 4) for m in METRICS}}
        record["methods"].setdefault(name, {"best": None, "tried": []})["tried"].append(tried[name, settings])
    for name, method in record["methods"].items():
        method["best"] = max(method["tried"], key=lambda t: t["average"])
        print(f"{name}: {method['best']}")
    TUNED.parent.mkdir(exist_ok=True)
    TUNED.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {TUNED.relative_to(HERE.parent)}")


def tuned_settings() -> dict[str, Settings]:
    if not TUNED.is_file():
        raise FileNotFoundError(f"{TUNED}: the tuned settings are missing; {COMMAND} finds them")
    methods = json.loads(TUNED.read_text())["methods"]
    return {name: Settings(*(method["best"][k] for k in Settings._fields)) for name, method in methods.items()}


def versions() -> dict[str, str]:
    import sklearn
    import transformers

    names = {"torch": torch, "transformers": transformers, "scikit-learn": sklearn}
    return {"python": platform.python_version(), **{name: module.__version__ for name, module in names.items()}}


def prove_parity(stream: Stream) -> None:
    """Hold every adapted layer of the model against fp64, under LoRA and C-LoRA, in the middle of the second task."""
    for name in (LORA, CLORA):
        torch.manual_seed(stream.seed)
        method = CONTESTANTS[name].attach(copy.deepcopy(stream.backbone))
        first, second = (stream.train.of(classes) for classes in stream.tasks[:2])
        settings = Settings("sgd", 0.02, 10.0)
        learn(method, first, settings, Meter(), epochs=2)
        method.begin_task()
        method.model.train()
        head = CosineHead(HIDDEN, 10)
        optimizer = make_optimizer(settings, [*method.param_groups(settings.lr), {"params": list(head.parameters())}])
        for images, labels in batches(second, 1):
            task_loss = functools.partial(classify, method.model, head, images, labels)
            method.training_step(images, task_loss, optimizer)
        for dtype in (torch.float32, torch.bfloat16):
            proved = assert_model_parity(method.model, task_loss, dtype)
            results = [deviation for layer in proved.values() for deviation in layer.values()]
            share = max(d.maximum / d.maximum_bound for d in results if d.maximum_bound)
            print(
                f"parity with fp64, {name}, {str(dtype)[6:]}: {len(results)} outputs and gradients of {len(proved)} "
                f"layers, the worst at {share:.2f} of what rounding explains"
            )


def costs(runs: list[Run]) -> dict[str, str]:
    """Columns of the table: trained values, median step, peak memory of a step."""
    seconds = [r.step_seconds for r in runs if r.step_seconds is not None]
    peaks = [r.step_bytes for r in runs if r.step_bytes is not None]
    return {
        "trained": str(runs[0].trainable),
        "ms a step": f"{1e3 * statistics.median(seconds):.1f}" if seconds else "-",
        "MB a step": f"{max(peaks) / 1e6:.1f}" if peaks else "-",
    }


def verdict(mine: list[dict[str, float]], baseline: list[dict[str, float]]) -> str:
    """The gains of C-LoRA in words, from the metrics of each seed."""
    average, learning = (
        Estimate.of([a[metric] - b[metric] for a, b in zip(mine, baseline, strict=True)])
        for metric in ("average", "learning")
    )
    side = "better" if learning.mean > 0 else "worse"
    return (
        f"{CLORA} over tuned LoRA: average {100 * average.mean:+.1f} ± {100 * average.se:.1f}, "
        f"{'more' if average.mean > 2 * average.se else 'NOT more'} than two standard errors; learning "
        f"{100 * learning.mean:+.1f} ± {100 * learning.se:.1f}, "
        f"{'within one point' if abs(learning.mean) <= 0.01 else f'{side} by more than one point'}"
    )


def caution(seeds: int) -> str:
    """What to think of a verdict of few seeds: nothing yet, and that of the committed table where it is at hand."""
    told = (
        f"{seeds} seed{'s decide' if seeds > 1 else ' decides'} nothing, whatever stands above: the class orders differ"
    )
    if not PUBLISHED.is_file():
        return f"{told} too much; {ENOUGH} were published"
    runs = json.loads(PUBLISHED.read_text())["runs"]
    return f"{told} too much. The {len(runs[CLORA])} seeds of {PUBLISHED.parent.name}/digits.md say: " + verdict(
        runs[CLORA], runs[LORA]
    )


def drift(runs: list[Run]) -> str:
    tasks = range(1, len(runs[0].reports))
    means = [statistics.mean(r.reports[t].measures["drift"] for r in runs) for t in tasks]
    return "the earlier tasks' path moved by " + ", ".join(
        f"{m:.1%} in task {t + 1}" for t, m in zip(tasks, means, strict=True)
    )


def compare(pool: Executor, seeds: range, repeats: int, out: Path) -> None:
    """Run every contestant on every seed, those that train as often as ``repeats`` says; print and write tables,
    pictures and numbers."""
    settings = tuned_settings()
    streams = make_streams(pool, seeds)
    # The longest first, so that no worker is left with them at the end.
    names = sorted(CONTESTANTS, key=lambda n: (not CONTESTANTS[n].joint, not CONTESTANTS[n].grid))
    jobs = {
        (name, seed, repeat): (run_contestant, stream, name, settings.get(name), repeat)
        for name in names
        for seed, stream in streams.items()
        for repeat in range(repeats if CONTESTANTS[name].grid else 1)
    }
    done = in_parallel(pool, "learning", jobs)
    runs = {
        name: [mean_of([done[name, seed, i] for i in range(repeats) if (name, seed, i) in jobs]) for seed in seeds]
        for name in CONTESTANTS
    }
    accuracies = {name: [r.accuracies for r in method_runs] for name, method_runs in runs.items()}
    numbers = {
        name: [{"seed": s, **summary(a)} for s, a in zip(seeds, of, strict=True)] for name, of in accuracies.items()
    }
    by_method = {name: costs(method_runs) for name, method_runs in runs.items()}
    columns = {heading: {name: c[heading] for name, c in by_method.items()} for heading in by_method[LORA]}
    chosen = {name: f"{s.optimizer} {s.lr:g}, head {s.head_scale:g}" for name, s in settings.items()}
    text = "\n\n".join(
        [
            f"{len(seeds)} seeds{f' of {repeats} runs each' if repeats > 1 else ''}, mean ± standard deviation, %",
            table(accuracies, {"tuned": chosen, **columns}),
            "the same class orders against each other, mean ± standard error, points (positive is better)",
            paired_table(accuracies, LORA),
            verdict(numbers[CLORA], numbers[LORA]),
            *([caution(len(seeds))] if len(seeds) < ENOUGH else []),
            f"{CLORA}: {drift(runs[CLORA])}",
        ]
    )
    print(f"\n{text}\n")
    prove_parity(streams[seeds[0]])
    (out / "digits.json").write_text(
        json.dumps({"versions": versions(), "repeats": repeats, "runs": numbers}, indent=1) + "\n"
    )
    (out / "digits.md").write_text(text + "\n")
    plot_accuracy_over_tasks(accuracies, out / "digits_accuracy.png")
    plot_forgetting_against_learning(accuracies, out / "digits_forgetting.png")
    print(f"written: digits.md, digits.json, digits_accuracy.png, digits_forgetting.png in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    seeds = os.environ.get("SEEDS", "5")  # text: checked as the option is
    parser.add_argument(
        "--seeds", type=int, default=seeds, help="how many seeds, from 0 (SEEDS, else 5; 10 to publish)"
    )
    repeats = os.environ.get("REPEATS", "1")
    parser.add_argument(
        "--repeats",
        type=int,
        default=repeats,
        help="training runs of each seed, averaged (REPEATS, else 1; 5 to publish)",
    )
    parser.add_argument("--tune", action="store_true", help=f"find the settings, write {TUNED.name}, stop")
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "digits", help="folder for the results")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    if not 1 <= args.seeds <= TUNING_SEEDS[0]:
        parser.error(f"--seeds: got {args.seeds}, expected 1 to {TUNING_SEEDS[0]}: from there on seeds are for tuning")
    if args.repeats < 1:
        parser.error(f"--repeats: got {args.repeats}, expected at least 1")
    if args.workers < 1:
        parser.error(f"--workers: got {args.workers}, expected at least 1")
    try:
        args.out.mkdir(parents=True, exist_ok=True)  # now rather than when everything is computed
    except OSError as error:
        parser.error(f"--out: {error}")
    try:
        require("transformers", "sklearn", "matplotlib", "tqdm")
    except ImportError as error:
        sys.exit(f"this comparison {error}")
    torch.set_num_threads(1)
    start = time.perf_counter()
    # Spawned: a forked child would inherit the state of torch's thread pools.
    with ProcessPoolExecutor(args.workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        if args.tune:
            tune(pool)
        else:
            compare(pool, range(args.seeds), args.repeats, args.out)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
