"""The metrics against values worked out by hand, the tables, the pictures, and input they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from clora_kernels.continual import (
    TaskAccuracies,
    paired_gains,
    paired_table,
    plot_accuracy_over_tasks,
    plot_forgetting_against_learning,
    summaries,
    summary,
    table,
)
from clora_kernels.continual import extras as extras_module
from clora_kernels.continual.metrics import Estimate, accuracy_over_tasks

NAN = math.nan


def run(shift: float = 0.0) -> TaskAccuracies:
    """Three tasks of 10, 20 and 10 samples; the second recovers a little before it is forgotten."""
    a = torch.tensor([[0.9, NAN, NAN], [0.5, 0.8, NAN], [0.7, 0.4, 1.0]], dtype=torch.float64)
    a[2, 2] -= shift
    return TaskAccuracies(a, torch.tensor([0.9, 0.85, 1.0 - shift], dtype=torch.float64), torch.tensor([10, 20, 10]))


def test_metrics_of_a_matrix_worked_out_by_hand() -> None:
    assert accuracy_over_tasks(run()).tolist() == pytest.approx([0.9, 21 / 30, 25 / 40])
    s = summary(run())
    assert s["last"] == pytest.approx(0.625)
    assert s["average"] == pytest.approx((0.9 + 0.7 + 0.625) / 3)
    assert s["forgetting"] == pytest.approx(((0.9 - 0.7) + (0.8 - 0.4)) / 2)
    assert s["bwt"] == pytest.approx(((0.7 - 0.9) + (0.4 - 0.8)) / 2)
    assert s["learning"] == pytest.approx((0.9 + 0.85 + 1.0) / 3)


def test_forgetting_counts_from_the_best_accuracy_and_bwt_from_the_first() -> None:
    a = [[0.5, NAN, NAN], [0.75, 0.5, NAN], [0.25, 0.5, 1.0]]
    s = summary(TaskAccuracies(torch.tensor(a), torch.ones(3), torch.ones(3)))
    assert (s["forgetting"], s["bwt"]) == (0.25, -0.125)


def test_a_single_task_forgets_nothing() -> None:
    s = summary(TaskAccuracies(torch.tensor([[0.5]]), torch.tensor([0.75]), torch.tensor([4])))
    assert s == {"last": 0.5, "average": 0.5, "forgetting": 0.0, "bwt": 0.0, "learning": 0.75}


def test_mean_standard_deviation_and_error() -> None:
    e = Estimate.of([1.0, 2.0, 3.0, 6.0])
    assert (e.mean, e.sd, e.se) == pytest.approx((3.0, math.sqrt(14 / 3), math.sqrt(14 / 3) / 2))
    assert math.isnan(Estimate.of([1.0]).sd)
    with pytest.raises(ValueError, match="values: got none"):
        Estimate.of([])


def test_paired_gains_take_out_what_the_runs_share() -> None:
    base, better = [run(0.2), run(0.6)], [run(0.1), run(0.5)]
    gains = paired_gains(better, base)
    assert gains["learning"].mean == pytest.approx(0.1 / 3) and gains["learning"].se == pytest.approx(0, abs=1e-15)
    assert summaries(base)["learning"].se > 0.05
    assert gains["forgetting"].mean == pytest.approx(0)
    # Less forgetting is a gain.
    a = run().accuracy.clone()
    a[2, 0] = 0.9
    kept = TaskAccuracies(a, run().task_masked, run().samples)
    assert paired_gains([kept], [run()])["forgetting"].mean == pytest.approx(0.1)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="runs: got 1, expected as many as baseline has, 2"):
        paired_gains([run()], [run(), run()])
    other = TaskAccuracies(run().accuracy, run().task_masked, torch.tensor([10, 20, 11]))
    with pytest.raises(ValueError, match=r"runs\[0\]: got samples"):
        paired_gains([other], [run()])


def test_tables_hold_every_method_metric_and_column() -> None:
    results = {"base": [run(0.2), run(0.6)], "better": [run(0.1), run(0.5)]}
    lines = table(results, {"ms": {"better": "1.5"}}).splitlines()
    assert [c.strip() for c in lines[0].strip("|").split("|")] == [
        "method", "last", "average", "forgetting", "bwt", "learning", "ms",
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    better = [c.strip() for c in lines[3].strip("|").split("|")]
    # last: 25/40 − 0.1/4 and − 0.5/4
    assert better[:2] == ["better", "55.0 ± 7.1"] and better[-1] == "1.5"
    # One run does not deviate.
    (alone,) = table({"one": results["better"][:1]}).splitlines()[2:]
    assert "±" not in alone and "nan" not in alone and alone.split("|")[2].strip() == "60.0"
    paired = paired_table(results, "base").splitlines()
    assert len(paired) == 3 and "+2.5 ± 0.0" in paired[2] and "base" not in paired[2]
    with pytest.raises(KeyError):
        paired_table(results, "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": torch.zeros(2, 3)}, r"accuracy: got shape \(2, 3\), expected \(3, 3\)"),
        ({"task_masked": torch.zeros(2)}, r"task_masked: got shape \(2,\)"),
        ({"accuracy": torch.full((3, 3), 1.5)}, r"accuracy: got .* expected fractions"),
        ({"accuracy": torch.full((3, 3), NAN)}, r"accuracy: got .* expected fractions"),
        ({"task_masked": torch.tensor([0.1, NAN, 0.1])}, r"task_masked: got .* expected fractions"),
        ({"samples": torch.tensor([1, 0, 1])}, "samples: got"),
        ({"samples": torch.zeros(0)}, r"samples: got shape|expected \(0, 0\)"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    good = {"accuracy": torch.zeros(3, 3), "task_masked": torch.zeros(3), "samples": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        TaskAccuracies(**{**good, **change})


@pytest.mark.parametrize("plot", [plot_accuracy_over_tasks, plot_forgetting_against_learning])
@pytest.mark.parametrize("runs", [1, 2])
def test_plots_are_pictures(plot, runs: int, tmp_path) -> None:
    results = {"base": [run(0.2), run(0.6)][:runs], "better": [run(0.1), run(0.5)][:runs]}
    path = plot(results, tmp_path / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    fewer = plot({"base": results["base"]}, tmp_path / "fewer.png")
    assert fewer.read_bytes() != path.read_bytes()
    with pytest.raises(ValueError, match=r"got no|got none"):
        plot({"nothing": []}, tmp_path / "none.png")


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path) -> None:
    find = extras_module.importlib.util.find_spec
    monkeypatch.setattr(
        extras_module.importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a)
    )
    with pytest.raises(ImportError, match=r"matplotlib.*pip install 'clora_kernels\[demo\]'"):
        plot_accuracy_over_tasks({"base": [run()]}, tmp_path / "plot.png")
