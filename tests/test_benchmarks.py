"""The benchmark commands: what they are given wrong they say, and their steps fit the commands they run."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clora_kernels import tune

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--points", "vit-q-bf16,nowhere"], "--points: got 'nowhere', expected some of "),
        (["--points", ""], "--points: got '', expected some of "),
        (["--contestants", "ours,nobody"], "--contestants: got nobody, expected some of "),
    ],
)
def test_unknown_names_are_errors_of_the_command_line(arguments, message):
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--device", "cpu", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2 and f"run.py: error: {message}" in done.stderr
    assert done.stderr.startswith("usage: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_suite_tunes_within_its_limit(device, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    import suite

    monkeypatch.setattr(suite, "_no_command", lambda name: "")
    step = suite.steps(torch.device(device), tmp_path, resumed=False)[-1]
    words = step.command[step.command.index("tune") + 1 :]
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    options = parser.parse_args(words)
    assert options.device == device and options.seconds < step.limit - 20
    assert options.output.is_relative_to(tmp_path), "what a suite found comes back with its results"
    assert ("TRITON_INTERPRET=1" in step.command) == (device == "cpu")


@pytest.mark.parametrize(
    "code, said, state",
    [
        (0, "the time is up: 3 of 9 calls are done, and the same command goes on from here\nsaved", "unfinished"),
        (0, "saved", "passed"),
        (1, "the time is up", "failed"),
    ],
)
def test_the_suite_goes_on_with_what_used_its_time_up(monkeypatch, tmp_path, code, said, state):
    monkeypatch.syspath_prepend(str(FOLDER))
    import suite

    program = f"import sys; print({said!r}); sys.exit({code})"
    outcome = suite._run(suite.Step("tune", [sys.executable, "-c", program], limit=30), 30, tmp_path)
    assert outcome.state == state
