"""Breaks the code in many small ways, one at a time; the tests must notice every one.

    python tests/mutants.py [--only TEXT] [--one-per-file] [--jobs N]

Each mutant is one replacement in one file, made in a copy of the package, on which the tests named beside it run until
the first failure. The outcomes go into the table ``tests/mutants.md``. Ends with status 1 if a mutant survives, or if
the tests fail on the unbroken copy. The mutants are listed in ``tests/mutations``, one file for each part of the code.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mutations import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "mutants.md"
TIMEOUT_S = 900
CANNOT_BE_IMPORTED = 70
# A mutant is broken for every processor: it need not be compiled for each.
ENVIRONMENT = {"CLORA_BUILD_CPU": "1", "CLORA_BUILD_CUDA": "0"} | dict.fromkeys(
    ("CFLAGS", "CXXFLAGS"), "-DCLORA_ONE_CLONE"
)

# Without a GPU Triton's kernels are interpreted, which Triton wants to know before anything imports it.
if not Path("/proc/driver/nvidia").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Processes forked off one that has imported what takes seconds to import.
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["torch", "torch._dynamo", "numpy", "pytest", "hypothesis.strategies"])


@dataclass(frozen=True)
class Outcome:
    """``state``: "killed", "survived", "gpu" (only a GPU can tell) or "error" (no test ran); ``by``: what failed."""

    mutant: Mutant
    state: str
    by: str


def mutated(mutant: Mutant, text: str) -> str:
    """Raises ValueError unless the text to replace stands in the file exactly once."""
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.id}: {mutant.file} holds {text.count(mutant.old)} times, expected once: {mutant.old!r}"
        )
    return text.replace(mutant.old, mutant.new)


@contextmanager
def copy_of(source: Path) -> Iterator[Path]:
    """What the tests and the build of the extension need."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        root = Path(folder)
        for name in ("clora_kernels", "csrc", "examples", "tests"):
            shutil.copytree(source / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(source / name, root / name)
        yield root


def run_tests(root: Path, tests: Iterable[str], first: str | None = None) -> tuple[str, str]:
    """("passed", ""), ("failed", the first test that did) or ("error", the last words of what kept the tests from
    running). ``first``: a test that comes before the files, if it is there."""
    if first is not None:
        status, by = run_files(root, [first])
        if status == "failed":
            return status, by
    done: set[str] = set()
    for pattern in tests:  # the likeliest first: what need not be collected is time saved
        names = [
            name for name in sorted(str(path.relative_to(root)) for path in root.glob(pattern)) if name not in done
        ]
        done.update(names)
        status, by = run_files(root, names) if names else ("passed", "")
        if status != "passed":
            return status, by
    return ("passed", "") if done else ("error", f"no file matches {' '.join(tests)}")


def run_files(root: Path, names: list[str]) -> tuple[str, str]:
    (root / "said").unlink(missing_ok=True)
    process = WARM.Process(target=_pytest, args=(root, names))
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        return "failed", f"no end within {TIMEOUT_S} s"
    said = (root / "said").read_text() if (root / "said").exists() else ""
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
    if process.exitcode == 0:
        return "passed", ""
    if process.exitcode == 1 and failed:
        return "failed", failed[1]
    if process.exitcode < 0:
        return "failed", f"a crash in {', '.join(names)}"
    return "error", f"status {process.exitcode}: {' '.join(said.split()[-30:])}"


def _pytest(root: Path, names: list[str]) -> None:
    """In a process of its own: pytest on the copy, its words in a file beside it."""
    said = os.open(root / "said", os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins want to be the first to import what is warm already
    sys.path[:] = [str(root), *(path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests"))]
    import pytest
    import torch

    torch.set_num_threads(1)
    try:
        import clora_kernels
    except Exception as error:
        print(error, flush=True)
        os._exit(CANNOT_BE_IMPORTED)
    if not Path(clora_kernels.__file__).is_relative_to(root):
        print(f"clora_kernels comes from {clora_kernels.__file__}", flush=True)
        os._exit(CANNOT_BE_IMPORTED)
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *names])
    sys.stdout.flush()
    os._exit(status)


def outcome(mutant: Mutant, source: Path = ROOT, first: str | None = None) -> Outcome:
    """``first``: the test that killed it before, which will do so again in far less time than all that come before."""
    if mutant.gpu:
        return Outcome(mutant, "gpu", "")
    with copy_of(source) as root:
        path = root / mutant.file
        try:
            path.write_text(mutated(mutant, path.read_text()))
            if mutant.file.startswith("csrc/") and not mutant.file.endswith(".cuh"):  # CUDA's are emulated by tests
                build(root)
        except (ValueError, subprocess.CalledProcessError) as error:
            return Outcome(mutant, "error", str(error))
        status, by = run_tests(root, mutant.tests, first)
    return Outcome(mutant, {"passed": "survived", "failed": "killed", "error": "error"}[status], by)


def build(root: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force"],
        cwd=root, env={**os.environ, **ENVIRONMENT}, check=True, capture_output=True,
    )  # fmt: skip


def check_the_unbroken(mutants: Iterable[Mutant], source: Path) -> None:
    """Raises RuntimeError unless the tests run on a copy, and pass there: else a failure would prove nothing."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    with copy_of(source) as root:
        status, by = run_tests(root, tests)
    if status != "passed":
        raise RuntimeError(f"the tests do not pass on the unbroken code: {by}")


def one_per_file(mutants: Iterable[Mutant]) -> list[Mutant]:
    return list({mutant.file: mutant for mutant in reversed(list(mutants)) if not mutant.gpu}.values())[::-1]


HEAD = """\
# Mutants

What `make mutants` breaks, and the first test that notices. Written by `tests/mutants.py`.

| mutant | file | what is broken | killed by |
|---|---|---|---|
"""


def row(done: Outcome) -> str:
    verdict = {"killed": f"`{done.by}`", "gpu": "only on a GPU"}.get(done.state, f"**{done.state}**")
    return f"| {done.mutant.id} | {done.mutant.file} | {done.mutant.what} | {verdict.replace('|', '/')} |"


def killers() -> dict[str, str]:
    """The test that the table says to have killed a mutant, by its id."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    rows = [line.strip("| ").split(" | ") for line in lines if "::test_" in line]
    return {row[0]: row[-1].strip("`") for row in rows}


def update_table(outcomes: Iterable[Outcome]) -> None:
    """The rows of these mutants are written anew, those of the others stay, and go where the mutant is gone."""
    old = TABLE.read_text().splitlines() if TABLE.exists() else []
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in old}
    rows |= {done.mutant.id: row(done) for done in outcomes}
    TABLE.write_text(HEAD + "".join(f"{rows[m.id]}\n" for m in MUTANTS if m.id in rows))


def run(mutants: list[Mutant], jobs: int, source: Path = ROOT) -> list[Outcome]:
    """The outcomes in the order of the mutants, printed as they come."""
    before = killers()
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = []
        for done in pool.map(outcome, mutants, [source] * len(mutants), [before.get(m.id) for m in mutants]):
            print(f"{done.state:8} {done.mutant.id:44} {done.by}", flush=True)
            outcomes.append(done)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants whose id or file holds this text")
    parser.add_argument("--one-per-file", action="store_true", help="the first mutant of each file")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.id or options.only in mutant.file]
    if not mutants:
        parser.error(f"--only: got {options.only!r}, which is in the id and the file of no mutant")
    mutants = one_per_file(mutants) if options.one_per_file else mutants
    with copy_of(ROOT) as source:  # of one moment: a run takes long enough for the code to change under it
        check_the_unbroken(mutants, source)
        outcomes = run(mutants, options.jobs, source)
    update_table(outcomes)
    alive = [done.mutant.id for done in outcomes if done.state in ("survived", "error")]
    print(f"{len(outcomes)} mutants, {len(alive)} alive: {', '.join(alive) or 'none'}")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
