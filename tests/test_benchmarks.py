"""The benchmark commands: what they are given wrong they say, and their steps fit the commands they run."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clora_kernels import tune

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command of the benchmarks that must fail, in this process; gives what it exits with and says."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(name).main()
        code = stop.value.code
        return (code, capsys.readouterr().err) if isinstance(code, int) else (1, code)

    return run


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--points", "vit-q-bf16,nowhere"], "--points: got 'nowhere', expected some of "),
        (["--points", ""], "--points: got '', expected some of "),
        (["--contestants", "ours,nobody"], "--contestants: got nobody, expected some of "),
        (["--device", "foo"], "--device foo: Expected one of cpu, cuda"),
        (["--device", "meta", "--quick"], "--device: got meta, expected cpu or cuda"),
        (["--device", "meta", "--gpu-suite"], "--device: got meta, expected cpu or cuda"),
        (["--threads", "-1"], "--threads: got -1, expected more than 0"),
        (["--seconds", "nan"], "--seconds: got nan, expected more than 0"),
    ],
)
def test_wrong_options_are_errors_of_the_command_line(command, arguments, message):
    code, said = command("run", "--device", "cpu", *arguments)
    assert code == 2 and f"run.py: error: {message}" in said and said.startswith("usage: ")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_suite_tunes_within_its_limit(device, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    import suite

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


@pytest.mark.parametrize(
    "text, message",
    [
        ("{broken", "cannot be read: Expecting property name"),
        ("{}", "got a file of something else"),
        ("[]", "got a file of something else"),
        (None, "cannot be read: "),
    ],
)
def test_a_file_that_holds_no_results_is_told(command, text, message, tmp_path):
    path = tmp_path / "results.json"
    path.mkdir() if text is None else path.write_text(text)
    code, said = command("run", "--device", "cpu", "--points", "digits-q", "--resume", str(path))
    assert code == 1 and f"--resume {path}: {message}" in said
    code, said = command("plot", str(path))
    assert code == 2 and f"plot.py: error: {path}: {message}" in said


def test_one_contestant_is_measured_beside_the_frozen_layer_and_drawn(command, tmp_path):
    path = tmp_path / "results.json"
    words = ["run.py", "--device", "cpu", "--points", "digits-q", "--seconds", "0.1", "--contestants", "ours"]
    done = subprocess.run([sys.executable, *words, "--output", str(path)], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["contestant"] for row in rows] == ["frozen", "ours"]
    assert rows[1]["ratio_to"]["frozen"]["both"]["median"] > 0
    code, said = command("plot", str(path), "--contestants", "nobody")
    assert code == 2 and "contestants: got nobody, expected some of frozen, ours" in said
    assert not path.with_suffix(".png").exists()
    sys.modules["plot"].draw(json.loads(path.read_text()), path.with_suffix(".png"), ["ours"])
    assert path.with_suffix(".png").stat().st_size > 5000
