"""The search for the settings of the comparison on digits, and what it left."""

from __future__ import annotations

import json
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from clora_kernels.continual import TaskAccuracies


@pytest.mark.parametrize("scenario", ["classes", "domains"])
def test_tuned_settings_are_the_best_of_what_was_tried_on_other_seeds(examples, scenario) -> None:
    import digits_methods

    compare, _ = examples
    record = json.loads(compare.TUNED.read_text())
    assert record["command"] == "python examples/compare_on_digits.py --tune"
    seeds, methods = (record[scenario][k] for k in ("seeds", "methods"))
    assert min(seeds) >= 100 and seeds == list(compare.TUNING_SEEDS[scenario])
    assert methods.keys() == {name for name, c in compare.CONTESTANTS.items() if c.rates and not c.ablation}
    chosen = compare.tuned_settings(scenario)
    for name, method in methods.items():
        assert [digits_methods.settings_of(t) for t in method["tried"]] == compare.CONTESTANTS[name].grid(scenario)
        assert method["best"] == max(method["tried"], key=lambda t: t["average"])
        assert chosen[name] == digits_methods.settings_of(method["best"])
        rates = [t["lr"] for t in method["tried"] if t["optimizer"] == chosen[name].optimizer]
        assert min(rates) < chosen[name].lr < max(rates), f"{name}: the best is at the edge of what was tried"
    for name, contestant in compare.CONTESTANTS.items():
        if contestant.ablation:
            assert chosen[name] == chosen[contestant.ablation]


@pytest.fixture
def small(examples, shorts, tmp_path, monkeypatch):
    """Two methods and an ablation of the first; what runs is recorded, and how good a setting is stands in ``best``."""
    import digits_methods

    rates = {"sgd": (0.05, 0.1, 0.15, 0.2)}
    contestants = {name: digits_methods.Contestant(lambda: None, rates) for name in ("first", "second")}
    contestants["part"] = digits_methods.Contestant(lambda: None, rates, ablation="first")
    best = {0.05: 0.1, 0.1: 0.5, 0.15: 0.2, 0.2: 0.7}
    small = types.SimpleNamespace(runs=[], best=best, fails=None, methods=digits_methods)

    def run_contestant(stream, name, settings):
        small.runs.append((stream.scenario, name))
        if (stream.scenario, name) == small.fails:
            raise KeyboardInterrupt
        accuracies = TaskAccuracies(torch.full((3, 3), small.best[settings.lr]), torch.ones(3), torch.ones(3))
        return examples[0].Run(accuracies, [])

    monkeypatch.setattr(digits_methods, "CONTESTANTS", contestants)
    monkeypatch.setattr(digits_methods, "FEWER", {"sgd": (0.1, 0.2)})
    monkeypatch.setattr(digits_methods, "run_contestant", run_contestant)
    monkeypatch.setattr(digits_methods, "make_stream", lambda seed, scenario: shorts[scenario])
    monkeypatch.setattr(digits_methods, "TUNED", tmp_path / "results" / "tuned.json")
    monkeypatch.setattr(digits_methods, "HERE", tmp_path / "examples")
    return small


def tune(small) -> None:
    with ThreadPoolExecutor(1) as pool:
        small.methods.tune(pool)


def test_tuning_keeps_what_was_tried_and_writes_after_every_method(small) -> None:
    def chosen(scenario):
        return {name: settings.lr for name, settings in small.methods.tuned_settings(scenario).items()}

    with pytest.raises(FileNotFoundError, match="--tune finds them"):
        chosen("classes")
    small.fails = ("domains", "second")
    with pytest.raises(KeyboardInterrupt):
        tune(small)
    assert chosen("classes") == {"first": 0.2, "second": 0.2, "part": 0.2}
    with pytest.raises(ValueError, match="no settings of second in domains"):
        chosen("domains")
    # What was tried keeps its result, and what is missing is tried.
    small.fails, small.best[0.1] = None, 0.9
    small.runs.clear()
    tune(small)
    assert small.runs == [("domains", "second")] * 2 * len(small.methods.TUNING_SEEDS["domains"])
    assert chosen("domains") == {"first": 0.2, "second": 0.1, "part": 0.2}
    assert chosen("classes") == {"first": 0.2, "second": 0.2, "part": 0.2}


@pytest.mark.parametrize("changed", ["versions", "protocol", "seeds"])
def test_what_was_tried_otherwise_is_tried_again(small, changed, monkeypatch) -> None:
    tune(small)
    if changed != "seeds":
        monkeypatch.setattr(small.methods, changed, lambda: {"another": 1})
    else:
        monkeypatch.setitem(small.methods.TUNING_SEEDS, "classes", (100,))
    small.runs.clear()
    tune(small)
    assert {scenario for scenario, _ in small.runs} == ({"classes", "domains"} if changed != "seeds" else {"classes"})


def test_a_frozen_head_has_no_scale_to_choose_and_fewer_rates(examples) -> None:
    lora = examples[0].CONTESTANTS[examples[0].LORA]
    every, fewer = lora.grid("classes"), lora.grid("domains")
    assert {s.head_scale for s in every} == {5.0, 10.0} and {s.head_scale for s in fewer} == {1.0}
    tried = [("sgd", lr) for lr in (0.01, 0.03, 0.05, 0.1, 0.2)] + [
        ("adamw", lr) for lr in (0.001, 0.005, 0.02, 0.05, 0.1)
    ]
    assert [(s.optimizer, s.lr) for s in fewer] == tried
    assert set(tried) < {(s.optimizer, s.lr) for s in every}


def test_only_c_lora_and_joint_training_are_not_tried_under_adamw(examples) -> None:
    contestants = examples[0].CONTESTANTS
    without = {name for name, c in contestants.items() if c.rates and "adamw" not in c.rates}
    assert without == {name for name in contestants if name.startswith("C-LoRA")} | {examples[0].JOINT}
    assert len({tuple(c.rates.items()) for name, c in contestants.items() if "adamw" in c.rates}) == 1
