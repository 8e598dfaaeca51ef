"""Everything a GPU machine has to say, in one command and 9 minutes, without a network: build, test, measure, tune.

Steps run most important first, each in its own process with a limit of its own within what is left of the whole. The
state of each is saved as it ends, its output as it is written. Called again on the same sources, the suite leaves out
what is done and goes on with what is not: tests with those that failed first, benchmarks at the point where they
stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from registry import OPERATIONS
from results import ROOT, stamp

WHOLE = {"cuda": 540.0, "cpu": 240.0}
QUICK, EVERY = 100.0, 360.0  # seconds for the benchmarks of all operations, at their quick and at all their points
SHORT_TESTS = ("test_routed_lora_fused.py", "test_gram_schmidt_errors.py", "test_dropout_mask.py")


@dataclass(frozen=True)
class Step:
    """A command with its limit in seconds. ``reserve`` is what it leaves for the steps after it."""

    name: str
    command: list[str]
    limit: float
    reserve: float = 0.0


@dataclass
class Outcome:
    """``state``: "passed", "unfinished" (its own time was up; it can go on), "failed", "out of time", "skipped"."""

    state: str
    seconds: float
    detail: str


def steps(device: torch.device, folder: Path, resumed: bool) -> list[Step]:
    """The suite of a device; on a CPU in short form: the same commands on little."""
    python, short = sys.executable, device.type == "cpu"
    run = [python, str(ROOT / "benchmarks" / "run.py"), "--device", device.type]
    tests = [python, "-m", "pytest", "-q", "--maxfail=100", *(["--failed-first"] if resumed else [])]
    tests += [f"tests/{name}" for name in SHORT_TESTS] if short else ["tests"]
    if find_spec("xdist"):  # tests wait for the compiler more than for the GPU
        tests += ["-n", "logical", "--dist", "worksteal", "-p", "no:benchmark"]
    # an operation's, a step of its own; in short form a point is what takes its time
    fast, limit = (40, 45) if short else (round(QUICK / len(OPERATIONS)), round(EVERY / len(OPERATIONS)))
    quick, every = [], []
    for name, operation in OPERATIONS.items():
        if operation.missing:
            continue
        few = ["--points", ",".join(point.name for point in operation.cpu_points[:1])] if short else []
        own = [*run, "--op", name, *few, "--resume"]
        words = [str(folder / f"quick-{name}.json"), "--quick", "--limit", str(fast)]
        quick.append(Step(f"quick {name}", [*own, *words], limit=fast + 20, reserve=0 if short else 90))
        words = [str(folder / f"benchmarks-{name}.json"), "--seconds", "2", "--limit", str(limit)]
        every.append(Step(f"benchmarks {name}", [*own, *words], limit=limit + 20, reserve=0 if short else 60))
    build = [python, "setup.py", "build_ext", "--inplace"]
    if device.type == "cuda" and torch.cuda.is_available():  # nvcc takes a minute and a half for each architecture
        build = ["env", "TORCH_CUDA_ARCH_LIST={}.{}".format(*torch.cuda.get_device_capability(device)), *build]
    tune = [*(["env", "TRITON_INTERPRET=1"] if short else []), python, "-m", "clora_kernels", "tune"]
    tune += ["--device", device.type, "--output", str(folder / "tables"), "--seconds", "20" if short else "150"]
    return [
        Step("build", build, limit=180, reserve=60),
        Step("selftest", [python, "-m", "clora_kernels", "selftest"], limit=40),
        *quick,
        Step("tests", tests, limit=60 if short else 180, reserve=20 if short else 120),
        *every,
        Step("tune", tune, limit=60 if short else 180),
    ]


def _environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT), "PYTHONUNBUFFERED": "1"}


def _sources() -> str:
    """A fingerprint of what the steps depend on."""
    digest = hashlib.sha256()
    for folder in ("clora_kernels", "csrc", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_suite(device: torch.device) -> int:
    """Run what is not done yet; 0 if nothing failed or ran out of time."""
    fingerprint, begun = _sources(), time.monotonic()
    folder = ROOT / "benchmarks" / "results" / f"suite-{device.type}-{fingerprint}"
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / "suite.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {"stamp": stamp(device), "steps": {}}
    done: dict[str, dict[str, object]] = state["steps"]
    print(f"{state['stamp']['device']}, torch {state['stamp']['torch']}: {WHOLE[device.type]:.0f} s, saved in {folder}")
    for step in steps(device, folder, resumed="tests" in done):
        if done.get(step.name, {}).get("state") == "passed":
            print(f"{step.name}: done before")
            continue
        left = WHOLE[device.type] - (time.monotonic() - begun) - step.reserve
        outcome = _run(step, left, folder)
        done[step.name] = asdict(outcome)
        state_file.write_text(json.dumps(state, indent=1) + "\n")
        print(f"{step.name}: {outcome.state} in {outcome.seconds:.0f} s. {outcome.detail}", flush=True)
    return int(any(outcome["state"] in ("failed", "out of time") for outcome in done.values()))


def _run(step: Step, left: float, folder: Path) -> Outcome:
    if left < 5:
        return Outcome("skipped", 0.0, "no time is left for it; the same command goes on from here")
    log = folder / f"{step.name.replace(' ', '-')}.log"
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=_environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        code = _wait(process, min(step.limit, left))
    lines = log.read_text(errors="replace").strip().splitlines()
    unfinished = any(line.startswith("the time is up") for line in lines)
    state = "out of time" if code is None else "failed" if code else "unfinished" if unfinished else "passed"
    return Outcome(state, time.monotonic() - start, lines[-1] if lines else "")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code, or None if time ran out: then the step and what it started are interrupted, and at last killed."""
    endings: list[Callable[[], None]] = [
        lambda: os.killpg(process.pid, signal.SIGINT),
        lambda: os.killpg(process.pid, signal.SIGKILL),
    ]
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        for end in endings:
            try:
                end()
                process.wait(10)
                break
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                break
        return None
