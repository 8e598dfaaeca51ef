"""The methods that are compared on digits, and the search for their settings."""

from __future__ import annotations

import functools
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from digits import (
    BATCH,
    EPOCHS,
    PRETRAINING_BATCH,
    PRETRAINING_CLASSES,
    PRETRAINING_EPOCHS,
    PRETRAINING_LR,
    SCENARIOS,
    Settings,
    Stream,
    make_stream,
)
from digits_runs import Run, run

from clora_kernels import RoutedLoRALinear
from clora_kernels.continual import DAC, SLAO, CLLoRA, CLoRA, SequentialLoRA, vit_targets
from clora_kernels.continual.metrics import METRICS, summaries

HERE = Path(__file__).resolve().parent
TUNED = HERE / "results" / "digits_tuned.json"
COMMAND = "python examples/compare_on_digits.py --tune"
# Three turned ones, and fewer rates, for the time it takes: a task has all ten digits.
TUNING_SEEDS = {"classes": tuple(range(100, 106)), "domains": tuple(range(100, 103))}
RANK, TARGETS = 8, vit_targets(("q", "v", "fc1", "fc2"))

Rates = dict[str, tuple[float, ...]]  # by optimizer
JOINT_SGD: Rates = {"sgd": (0.03, 0.05, 0.1, 0.2)}
SGD: Rates = {"sgd": (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)}
SGD_AND_ADAMW: Rates = {**SGD, "adamw": (0.0003, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)}
FEWER: Rates = {"sgd": (0.01, 0.03, 0.05, 0.1, 0.2), "adamw": (0.001, 0.005, 0.02, 0.05, 0.1)}
SCALES = (5.0, 10.0)


class Contestant(NamedTuple):
    """A method, how it is attached to a backbone, and the rates it is tuned over (none: it does not train).

    ``ablation``: of which method it is one, with that method's settings; only the full comparison has it.
    """

    attach: Callable[..., Any]
    rates: Rates
    joint: bool = False
    ablation: str | None = None

    def grid(self, scenario: str) -> list[Settings]:
        """The settings that are tried; a frozen head has no scale to choose, and fewer rates will do."""
        if scenario == "classes":
            return [Settings(kind, lr, scale) for kind in self.rates for scale in SCALES for lr in self.rates[kind]]
        return [Settings(kind, lr, 1.0) for kind, lrs in self.rates.items() for lr in lrs if lr in FEWER[kind]]


class OpenPathLinear(RoutedLoRALinear):
    """C-LoRA's layer without the stopped path: A and B learn through R_old too."""

    def adapter_tensors(self) -> tuple[Any, ...]:
        lora_A, lora_B, routing, frozen_routing = super().adapter_tensors()
        return lora_A, lora_B, routing + frozen_routing, None


class OpenPathCLoRA(CLoRA):
    layer_type = OpenPathLinear


FROZEN, LORA, CLORA = "frozen backbone", "LoRA, task after task", "C-LoRA"
FIRST, JOINT = "LoRA, first task only", "LoRA, all tasks jointly"
LAYER = {"targets": TARGETS, "r": RANK}
CONTESTANTS = {
    FROZEN: Contestant(functools.partial(SequentialLoRA, **LAYER, train="never"), {}),
    FIRST: Contestant(functools.partial(SequentialLoRA, **LAYER, train="first_task"), SGD_AND_ADAMW),
    LORA: Contestant(functools.partial(SequentialLoRA, **LAYER), SGD_AND_ADAMW),
    CLORA: Contestant(functools.partial(CLoRA, **LAYER), SGD),
    "C-LoRA without its loss": Contestant(functools.partial(CLoRA, **LAYER, orthogonality=0.0), SGD, ablation=CLORA),
    "C-LoRA without the stopped path": Contestant(functools.partial(OpenPathCLoRA, **LAYER), SGD, ablation=CLORA),
    "CL-LoRA": Contestant(functools.partial(CLLoRA, targets=vit_targets(("q", "v")), r=RANK), SGD_AND_ADAMW),
    "DAC": Contestant(functools.partial(DAC, targets=vit_targets(("q", "k", "v", "out", "fc1", "fc2"))), SGD_AND_ADAMW),
    "SLAO": Contestant(functools.partial(SLAO, **LAYER), SGD_AND_ADAMW),
    JOINT: Contestant(functools.partial(SequentialLoRA, **LAYER), JOINT_SGD, joint=True),
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


def make_streams(pool: Executor, seeds: Iterable[int], scenario: str) -> dict[int, Stream]:
    return in_parallel(pool, f"pretraining, {scenario}", {seed: (make_stream, seed, scenario) for seed in seeds})


def tune(pool: Executor) -> None:
    """Write each method's settings with the best average accuracy over the tuning seeds, and all that were tried, as
    soon as a scenario or a method is through. What the file has from the same seeds and versions is not tried again."""
    before = json.loads(TUNED.read_text()) if TUNED.is_file() else {}
    record: dict[str, Any] = {"command": COMMAND, "versions": versions(), "protocol": protocol()}
    same = all(before.get(key) == record[key] for key in ("versions", "protocol"))
    record |= {scenario: {"seeds": list(TUNING_SEEDS[scenario]), "methods": {}} for scenario in SCENARIOS}
    for scenario in SCENARIOS:
        old = before.get(scenario, {})
        if same and old.get("seeds") == record[scenario]["seeds"]:
            record[scenario]["methods"] = {n: m for n, m in old["methods"].items() if n in CONTESTANTS}
    for scenario in SCENARIOS:
        methods, streams = record[scenario]["methods"], None
        for name, contestant in CONTESTANTS.items():
            grid = [] if contestant.ablation else contestant.grid(scenario)
            known = {settings_of(t): t for t in methods.pop(name, {"tried": []})["tried"]}
            new = [settings for settings in grid if settings not in known]
            if new and streams is None:
                streams = make_streams(pool, TUNING_SEEDS[scenario], scenario)
            jobs = {
                (s, seed): (run_contestant, stream, name, s) for s in new for seed, stream in (streams or {}).items()
            }
            runs = in_parallel(pool, f"tuning, {scenario}: {name}", jobs) if jobs else {}
            for settings in new:
                means = summaries([runs[settings, seed].accuracies for seed in TUNING_SEEDS[scenario]])
                known[settings] = {**settings._asdict(), **{m: round(means[m].mean, 4) for m in METRICS}}
            if grid:
                tried = [known[settings] for settings in grid]
                methods[name] = {"best": max(tried, key=lambda t: t["average"]), "tried": tried}
                print(f"{scenario}, {name}: {methods[name]['best']}")
            TUNED.parent.mkdir(exist_ok=True)
            TUNED.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {TUNED.relative_to(HERE.parent)}")


def settings_of(tried: dict[str, Any]) -> Settings:
    return Settings(*(tried[k] for k in Settings._fields))


def tuned_settings(scenario: str) -> dict[str, Settings]:
    """The settings of every contestant that trains."""
    if not TUNED.is_file():
        raise FileNotFoundError(f"{TUNED}: the tuned settings are missing; {COMMAND} finds them")
    methods = json.loads(TUNED.read_text())[scenario]["methods"]
    wanted = {name: contestant.ablation or name for name, contestant in CONTESTANTS.items() if contestant.rates}
    missing = sorted({of for of in wanted.values() if of not in methods})
    if missing:
        raise ValueError(f"{TUNED}: no settings of {', '.join(missing)} in {scenario}; {COMMAND} finds them")
    return {name: settings_of(methods[of]["best"]) for name, of in wanted.items()}


def protocol() -> dict[str, Any]:
    """What the runs of every method share: with another one nothing that was tried counts."""
    return {
        "rank": RANK,
        "epochs": EPOCHS,
        "batch": BATCH,
        "pretraining": [PRETRAINING_EPOCHS, PRETRAINING_BATCH, PRETRAINING_LR, PRETRAINING_CLASSES],
    }


def versions() -> dict[str, str]:
    import sklearn
    import transformers

    names = {"torch": torch, "transformers": transformers, "scikit-learn": sklearn}
    return {"python": platform.python_version(), **{name: module.__version__ for name, module in names.items()}}


def provenance() -> str:
    """Commit (with + where files differ from it), processor and versions, in a line."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--exclude", "*", "--dirty=+"]
    known = shutil.which("git") and subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"^model name\s*: (.*)", told, re.MULTILINE)
    processor = named[1] if named else platform.processor()
    return ", ".join([f"commit {known or 'unknown'}", processor, *(f"{k} {v}" for k, v in versions().items())])
