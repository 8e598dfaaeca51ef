"""Builds C++ with AddressSanitizer and UndefinedBehaviorSanitizer and runs programs that load what was built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

COMPILER = "g++"
TIMEOUT_S = 300  # what is broken may never end
FLAGS = ["-std=c++17", "-fPIC", "-fno-omit-frame-pointer", "-fvisibility=hidden"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@cache
def why_not() -> str:
    """Why nothing can be built with sanitizers here, or loaded into this Python; empty if it can."""
    if shutil.which(COMPILER) is None:
        return f"there is no {COMPILER}"
    if not all(map(os.path.isabs, _runtimes())):
        return f"{COMPILER} comes without libasan or libubsan"
    done = subprocess.run(
        [COMPILER, *FLAGS, "-x", "c++", "-", "-o", os.devnull], input="_Float16 half; int main() {}",
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return f"{COMPILER} does not build with sanitizers: {done.stderr.strip()[-300:]}"
    done = run(["-c", ""])
    return f"Python does not run with sanitizers: {done.stderr.strip()[-300:]}" if done.returncode else ""


def _runtimes() -> list[str]:
    """Where the libraries lie that must be loaded first; a name alone where the compiler knows of none."""
    names = ("libasan.so", "libubsan.so")
    ask = [[COMPILER, f"-print-file-name={name}"] for name in names]
    return [subprocess.run(one, capture_output=True, text=True, check=True).stdout.strip() for one in ask]


def build(source: Path, target: Path, *options: str) -> None:
    """An object file of the source, or a library where ``options`` say so."""
    done = subprocess.run(
        [COMPILER, *FLAGS, *options, str(source), "-o", str(target)], capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def run(arguments: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python with the sanitizers loaded before it, and the package as it lies in ``folder``."""
    found = dict(os.environ, LD_PRELOAD=" ".join(_runtimes()), OMP_NUM_THREADS="1")
    found |= {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    found |= {"PYTHONPATH": os.pathsep.join([str(folder or ""), os.path.dirname(__file__)])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=found, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
