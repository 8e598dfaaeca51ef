"""The benchmark commands: what they are given wrong they say, and their steps fit the commands they run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clora_kernels import tune

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def command(benchmarks, monkeypatch, capsys):
    """Runs a command of the benchmarks that must fail, in this process; gives what it exits with and says."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            benchmarks(name).main()
        code = stop.value.code
        return (code, capsys.readouterr().err) if isinstance(code, int) else (1, code)

    return run


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--points", "vit-q-bf16,nowhere"], "--points: got 'nowhere', expected some of "),
        (["--points", ""], "--points: got '', expected some of "),
        (["--contestants", "ours,nobody"], "--contestants: got 'nobody', expected some of "),
        (["--op", "nothing"], "argument --op: invalid choice: 'nothing' (choose from "),
        (
            ["--op", "routed_lora", "--points", "vit-r16-b48"],
            "--points: got 'vit-r16-b48', expected some of vit-q-bf16, ",
        ),
        (["--op", "gram_schmidt", "--contestants", "peft"], "--contestants: got 'peft', expected some of qr, ours, "),
        (["--points", "vit-q-bf16", "--contestants", "qr"], "--contestants: got 'qr', none of the operation that has "),
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


def test_names_choose_operations_points_and_contestants(benchmarks):
    registry, cpu = benchmarks("registry"), torch.device("cpu")

    def chosen(**options):
        return {
            s.operation.name: ([point.name for point in s.points], s.contestants)
            for s in registry.select(cpu, **options)
        }

    everything = chosen()
    assert list(everything) == ["routed_lora", "gram_schmidt", "rank1_experts", "continual", "peft"]
    assert set(chosen(op="gram_schmidt")) == {"gram_schmidt"}
    for name, operation in registry.OPERATIONS.items():
        points, contestants = everything[name]
        assert points == [point.name for point in operation.cpu_points] and set(contestants) == set(operation.builders)
        assert contestants[0] == operation.yardstick and len(contestants) == len(operation.builders)
        assert not operation.memory_above or operation.memory_above in contestants[:2]
        quick, fast = chosen(quick=True)[name]
        assert set(quick) == {point.name for point in operation.cpu_points if point.quick}
        assert fast == [name for name in contestants if name not in operation.slow]
    assert chosen(points="digits-q,vit-r16-b48", contestants="ours,qr") == {
        "routed_lora": (["digits-q"], ["frozen", "ours"]),
        "gram_schmidt": (["vit-r16-b48"], ["qr", "ours"]),
    }
    assert chosen(contestants="cholesky_qr2")["gram_schmidt"][1] == ["qr", "cholesky_qr2"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_points_are_few_and_their_names_tell_them_apart(benchmarks, device):
    names = [p.name for o in benchmarks("registry").OPERATIONS.values() for p in o.points(torch.device(device))]
    assert len(set(names)) == len(names), "a name that two operations have would choose both"
    for operation in benchmarks("registry").OPERATIONS.values():
        points = operation.points(torch.device(device))
        assert 20 < len(points) <= 40 and {p.dtype for p in points} == {torch.float32, torch.bfloat16}
        assert {operation.yardstick, *operation.bounds, *operation.ours, *operation.slow} <= set(operation.builders)


def test_the_points_of_gram_schmidt_cover_their_range(benchmarks):
    for points in (benchmarks("gram_schmidt").CPU_POINTS, benchmarks("gram_schmidt").GPU_POINTS):
        for size, least, most in (("B", 1, 512), ("d", 768, 16384), ("r", 4, 256)):
            assert {min(getattr(p, size) for p in points), max(getattr(p, size) for p in points)} == {least, most}
        assert any(p.k for p in points)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_suite_measures_every_operation(device, benchmarks, tmp_path):
    run, registry = benchmarks("run"), benchmarks("registry")
    steps = benchmarks("suite").steps(torch.device(device), tmp_path, resumed=False)
    measured = []
    for step in (step for step in steps if str(FOLDER / "run.py") in step.command):
        options = run.parser_of_arguments().parse_args(step.command[2:])
        (selection,) = registry.select(torch.device(device), options.op, options.points, None, options.quick)
        assert Path(options.resume).is_relative_to(tmp_path) and options.limit < step.limit
        measured.append((selection.operation.name, "quick" if options.quick else "all", len(selection.points)))
    few = {name: 1 for name in registry.OPERATIONS} if device == "cpu" else {}
    every = {name: few.get(name, len(o.gpu_points)) for name, o in registry.OPERATIONS.items()}
    quick = {name: few.get(name, sum(p.quick for p in o.gpu_points)) for name, o in registry.OPERATIONS.items()}
    assert measured == [(n, "quick", c) for n, c in quick.items()] + [(n, "all", c) for n, c in every.items()]
    if device == "cuda":  # what comes before the tests leaves them what they leave to others, however many operations
        names = [step.name for step in steps]
        tests, whole = steps[names.index("tests")], benchmarks("suite").WHOLE[device]
        assert sum(step.limit for step in steps[: names.index("tests")]) <= whole - tests.reserve


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_suite_tunes_within_its_limit(device, benchmarks, tmp_path):
    step = benchmarks("suite").steps(torch.device(device), tmp_path, resumed=False)[-1]
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
def test_the_suite_goes_on_with_what_used_its_time_up(benchmarks, tmp_path, code, said, state):
    suite = benchmarks("suite")
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


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A file of both operations, which the command wrote in two runs, and what they said."""
    path = tmp_path_factory.mktemp("measured") / "results.json"
    words = ["--device", "cpu", "--seconds", "0.1", "--resume", str(path), "--contestants", "ours,cholesky_qr2"]
    first = [sys.executable, "run.py", *words, "--points", "digits-q"]
    done = subprocess.run(first, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.syspath_prepend(str(FOLDER))
        run, roofline = importlib.import_module("run"), importlib.import_module("roofline")
        rates = {torch.float32: 1e11, torch.bfloat16: 2e11}
        patch.setattr(run, "measure_ceilings", lambda device, dtypes, clock: roofline.Ceilings(2e10, rates))
        assert run.main([*words, "--points", "digits-q,vit-r4-b48,vit-r4-b1"]) == 0
    return path, done.stdout, said.getvalue()


def test_both_operations_are_measured_beside_their_yardsticks(measured):
    path, first, second = measured
    rows = json.loads(path.read_text())["rows"]
    assert [(row["operation"], row["point"]["name"], row["contestant"]) for row in rows] == [
        ("routed_lora", "digits-q", "frozen"),
        ("routed_lora", "digits-q", "ours"),
        *(
            ("gram_schmidt", point, who)
            for point in ("vit-r4-b48", "vit-r4-b1")
            for who in ("qr", "ours", "cholesky_qr2")
        ),
    ]
    assert rows[1]["ratio_to"]["frozen"]["both"]["median"] > 0 and rows[1]["peak_above_frozen_bytes"] > 0
    ours = rows[3]
    assert ours["ratio_to"].keys() == {"qr", "cholesky_qr2"} and 0 < ours["error_gradient"] < 1e-6
    # V is read twice and Q written, 48·768·4 elements of 4 bytes: the least that can be moved
    assert ours["floor"]["forward"]["bytes"] == 3 * 48 * 768 * 4 * 4
    assert ours["traffic"]["forward"] == pytest.approx(
        ours["seconds"]["forward"]["median"] * 2e10 / (3 * 48 * 768 * 16)
    )
    assert "gram_schmidt, over" not in first and "gram_schmidt, over torch.linalg.qr" in second
    assert "ours / qr, 2 points: time, geometric mean: forward " in second
    assert " of 1 with B·d·r >= 1e5" in second and " of 1 others" in second


def test_each_operation_is_drawn(benchmarks, measured, tmp_path, monkeypatch, capsys):
    path, *_ = measured
    plot = benchmarks("plot")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(path), "--output", str(tmp_path / "times.png")])
    plot.main()
    drawn = [tmp_path / f"times-{name}.png" for name in ("routed_lora", "gram_schmidt")]
    assert capsys.readouterr().out.split() == [str(p) for p in drawn]
    assert all(p.stat().st_size > 5000 for p in drawn)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--op", "gram_schmidt"])
    plot.main()
    assert (tmp_path / "times.png").read_bytes() == drawn[1].read_bytes()


def test_what_cannot_be_drawn_is_told(command, measured, tmp_path):
    path, *_ = measured
    code, said = command("plot", str(path), "--op", "routed_lora", "--contestants", "nobody")
    assert code == 2 and "contestants: got nobody, expected some of frozen, ours" in said
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({**json.loads(path.read_text()), "rows": []}))
    code, said = command("plot", str(empty))
    assert code == 2 and "the file holds no measured row" in said
    code, said = command("plot", str(empty), "--op", "gram_schmidt")
    assert code == 2 and "the file holds no measured row of gram_schmidt" in said
    assert not empty.with_suffix(".png").exists()


def test_results_from_before_there_were_operations_are_read_and_drawn(benchmarks, tmp_path):
    old = json.loads((FOLDER / "results" / "cpu-epyc-zen4-1thread.json").read_text())
    old["rows"] = [{k: v for k, v in row.items() if k != "operation"} for row in old["rows"]]
    (path := tmp_path / "old.json").write_text(json.dumps(old))
    results, operation = benchmarks("results"), benchmarks("registry").OPERATIONS["routed_lora"]
    content = results.read(path)
    assert {row["operation"] for row in content["rows"]} == {"routed_lora"}
    assert "ours / peft, 32 points: time, geometric mean: forward 0." in results.against(
        content["rows"], operation, "peft"
    )
    assert results.against(content["rows"], operation, "unsloth") == "", "nothing is said of who was not there"
    assert len(results.table(content["rows"], operation).splitlines()) == len(content["rows"])
    benchmarks("plot").draw(content, tmp_path / "old.png", operation, ["ours"])
    assert (tmp_path / "old.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "wrong, of_ours, of_others",
    [
        ("V", "V is off by", "V is off by"),
        ("Q", "beyond the gates", "Q is off by"),
        ("orthogonality", "beyond the gates", "Q is off by"),
        ("sign", "beyond the gates", None),
    ],
)
def test_nobody_is_timed_with_a_wrong_result(benchmarks, wrong, of_ours, of_others, monkeypatch):
    """A gradient that is a thousandth off, Q of another matrix, Q that is not orthonormal; R with a negative diagonal,
    which others may have."""
    gram_schmidt, checks = benchmarks("gram_schmidt"), benchmarks("gram_schmidt.checks")
    point = next(p for p in gram_schmidt.CPU_POINTS if p.name == "vit-r16-k48-b48")
    problem = gram_schmidt.make_problem(dataclasses.replace(point, B=2), torch.device("cpu"))
    truth = gram_schmidt.truths(problem)
    assert checks.check("ours", problem, truth).error_Q < 1e-6
    right = checks.BUILDERS["ours"]

    def broken(given):
        contestant = right(given)
        if wrong == "V":
            return dataclasses.replace(contestant, gradients=tuple(1.001 * g for g in contestant.gradients))
        if wrong == "Q":
            return dataclasses.replace(contestant, run=lambda V: contestant.run(V.flip(0)))
        factor = -1 if wrong == "sign" else 1.001
        return dataclasses.replace(contestant, run=lambda V: tuple(factor * t for t in contestant.run(V)))

    for name, message in (("ours", of_ours), ("qr", of_others)):
        monkeypatch.setitem(checks.BUILDERS, name, broken)
        with pytest.raises(AssertionError, match=message) if message else contextlib.nullcontext():
            checks.check(name, problem, truth)
