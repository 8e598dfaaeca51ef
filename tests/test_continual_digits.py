"""The comparison on digits: its data, one short run of every contestant, what it prints and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from short_digits import EXAMPLES


def test_the_split_is_stratified(examples) -> None:
    train, test = examples[1].load_digits(0)
    assert (len(train.labels) + len(test.labels), len(test.labels)) == (1797, 540)
    for c in range(10):
        share = len(test.of([c]).labels) / (len(train.of([c]).labels) + len(test.of([c]).labels))
        assert abs(share - 0.3) < 0.01
    assert train.images.shape == (1257, 1, 8, 8) and (train.images.min(), train.images.max()) == (0, 1)


def test_tasks_of_classes_share_none(streams) -> None:
    stream = streams["classes"]
    classes = [samples.labels.unique().tolist() for samples in stream.train]
    assert [len(c) for c in classes] == [2, 2, 2] and len({c for task in classes for c in task}) == 6
    assert [samples.labels.unique().tolist() for samples in stream.test] == classes
    assert stream.head is None and not any(p.requires_grad for p in stream.backbone.parameters())


def test_tasks_of_domains_are_all_digits_turned(examples, streams) -> None:
    stream, (train, test) = streams["domains"], examples[1].load_digits(0)
    for upright, tasks in ((train, stream.train), (test, stream.test)):
        found = []
        for samples in tasks:
            assert torch.equal(samples.labels, upright.labels)
            found += [k for k in range(4) if torch.equal(samples.images.rot90(-k, (-2, -1)), upright.images)]
        assert sorted(found) == [1, 2, 3]
    frozen = [*stream.backbone.parameters(), *stream.head.parameters()]
    assert not any(p.requires_grad for p in frozen)
    samples = stream.train[0]
    assert torch.equal(examples[1].Samples.of_all(stream.train).labels, samples.labels.repeat(3))


def same(a, b) -> bool:
    lower = torch.tril_indices(3, 3).unbind()
    return torch.equal(a.accuracy[lower], b.accuracy[lower]) and torch.equal(a.task_masked, b.task_masked)


@pytest.mark.parametrize("scenario", ["classes", "domains"])
def test_every_contestant_runs_and_repeats_itself(examples, shorts, scenario) -> None:
    compare, digits = examples
    stream, settings = shorts[scenario], digits.Settings("sgd", 0.02, 10.0)
    runs = {
        name: compare.run_contestant(stream, name, settings if contestant.rates else None)
        for name, contestant in compare.CONTESTANTS.items()
    }
    for name in (compare.CLORA, "DAC"):
        assert same(compare.run_contestant(stream, name, settings).accuracies, runs[name].accuracies)
    for name, run in runs.items():
        # Of one task the classes are all there are, in either scenario.
        assert run.accuracies.accuracy[0, 0] == run.accuracies.task_masked[0]
        trains = name != "frozen backbone"
        trained = max(report.trainable for report in run.reports)
        assert (trained > 0) == trains, name
    # r·(K + N) of q, v, fc1 and fc2 in four blocks; C-LoRA has its r² beside them.
    lora = 4 * 8 * (2 * (64 + 64) + (64 + 128) + (128 + 64))
    assert (
        runs[compare.LORA].reports[0].trainable == lora and runs[compare.CLORA].reports[0].trainable == lora + 16 * 64
    )
    drifts = [report.measures["drift"] for report in runs[compare.CLORA].reports]
    assert drifts[0] is None and all(0 < d < 1 for d in drifts[1:])
    # What an ablation leaves out makes no difference before there is an old routing.
    for name in ("C-LoRA without its loss", "C-LoRA without the stopped path"):
        mine, whole = (runs[n].accuracies.accuracy for n in (name, compare.CLORA))
        assert mine[0, 0] == whole[0, 0]


def test_an_open_path_gives_the_factors_the_gradient_of_the_old_routing(examples, shorts) -> None:
    import digits_methods

    gradients = {}
    for name in (examples[0].CLORA, "C-LoRA without the stopped path"):
        torch.manual_seed(0)
        method = examples[0].CONTESTANTS[name].attach(copy.deepcopy(shorts["classes"].backbone))
        method.begin_task()
        layer = next(iter(method.layers.values()))
        layer.frozen_routing.copy_(torch.eye(layer.r))
        assert isinstance(layer, digits_methods.OpenPathLinear) == (name != examples[0].CLORA)
        layer(torch.ones(2, layer.in_features)).sum().backward()
        gradients[name] = layer.lora_A.grad, layer.lora_B.grad, layer.routing.grad
    stopped, open_path = gradients.values()
    # R_δ is zero: with the old path stopped nothing reaches A and B.
    assert not any(g.any() for g in stopped[:2]) and all(g.any() for g in open_path[:2])
    torch.testing.assert_close(stopped[2], open_path[2])


def test_the_most_certain_view_answers_where_all_share_a_head(examples) -> None:
    import digits_runs

    head = torch.nn.Identity()
    first, second = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [4.0, 0.0]])
    assert digits_runs.predict(head, [first, second]).tolist() == [0, 0]
    assert digits_runs.predict(head, [first, second], task=1).tolist() == [0, 1]
    assert digits_runs.predict(head, [first, second], task=2).tolist() == [1, 0]
    assert digits_runs.predict(head, [second], task=2).tolist() == [1, 0]


def test_runs_of_one_seed_are_averaged(examples, shorts) -> None:
    import digits_runs

    compare, digits = examples
    settings = digits.Settings("sgd", 0.05, 10.0)
    one, other = (compare.run_contestant(shorts["classes"], compare.CLORA, settings, repeat) for repeat in (0, 1))
    assert not torch.equal(one.accuracies.accuracy, other.accuracies.accuracy), "another draw"
    mean = digits_runs.mean_of([one, other])
    for name in ("accuracy", "task_masked"):
        a, b, both = (getattr(run.accuracies, name) for run in (one, other, mean))
        torch.testing.assert_close(both, (a + b) / 2, equal_nan=True)
    assert mean.reports == one.reports


def test_the_whole_comparison_writes_what_it_says(examples, shorts, tmp_path, capsys, monkeypatch) -> None:
    import digits_methods

    compare, digits = examples
    few = {
        name: dataclasses.replace(
            stream,
            train=[digits.Samples(*(t[:12] for t in task)) for task in stream.train],
            test=[digits.Samples(*(t[:12] for t in task)) for task in stream.test],
        )
        for name, stream in shorts.items()
    }
    for module in (compare, digits_methods):
        monkeypatch.setattr(
            module, "make_stream", lambda seed, scenario="classes": dataclasses.replace(few[scenario], seed=seed)
        )
    with ThreadPoolExecutor(1) as pool:
        compare.compare_all(pool, range(2), 2, True, tmp_path)
    out = capsys.readouterr().out
    for name in compare.CONTESTANTS:
        rows = re.findall(rf"^\| {re.escape(name)} +\|", out, re.MULTILINE)
        tables = 1 if name == compare.LORA else 3 if compare.CONTESTANTS[name].ablation else 2
        assert len(rows) == 2 * tables, name
    published = (EXAMPLES / "results" / "digits.md").read_text()
    assert out.count("2 seeds of 2 runs each") == 2 and out.count("2 seeds decide nothing") == 2
    told = [line for line in published.splitlines() if " over tuned LoRA: " in line]
    assert len(told) == 2 * (len(compare.CONTESTANTS) - len(compare.BASELINES)) and all(line in out for line in told)
    assert out.count("C-LoRA: drift -, ") == 2
    for dtype in ("float32", "bfloat16"):
        assert f"parity with fp64, C-LoRA, {dtype}: " in out and "of 16 layers" in out
    *parts, measured = (tmp_path / "digits.md").read_text().strip().split("\n\n")
    assert all(part in out for part in parts)
    written = json.loads((tmp_path / "digits.json").read_text())
    assert measured == f"Measured at {written['measured']}."
    assert re.match(rf"commit \w+\+?, .+, python .+, torch {re.escape(torch.__version__)}, ", written["measured"])
    runs = written["runs"]
    of_dac = written["reports"]["classes"]["DAC"]
    assert [[report["task"] for report in seed] for seed in of_dac] == [[1, 2, 3]] * 2
    for of_scenario in (runs["classes"], runs["domains"]):
        assert {n: [r["seed"] for r in of] for n, of in of_scenario.items()} == {n: [0, 1] for n in compare.CONTESTANTS}
    for scenario in runs:
        pictures = [tmp_path / f"digits_{scenario}_{x}.png" for x in ("accuracy", "forgetting")]
        assert all(picture.stat().st_size > 5000 for picture in pictures)


def test_without_full_there_is_one_scenario_and_no_ablation(examples, shorts, tmp_path, monkeypatch) -> None:
    import digits_methods

    compare, _ = examples
    monkeypatch.setattr(
        digits_methods, "make_stream", lambda seed, scenario: dataclasses.replace(shorts[scenario], seed=seed)
    )
    compared = []
    monkeypatch.setattr(compare, "prove_parity", lambda stream: None)
    monkeypatch.setattr(compare, "make_stream", lambda seed: None)
    original = compare.compare
    monkeypatch.setattr(
        compare, "compare", lambda pool, scenario, *a: compared.append(scenario) or original(pool, scenario, *a)
    )
    with ThreadPoolExecutor(1) as pool:
        compare.compare_all(pool, range(1), 1, False, tmp_path)
    runs = json.loads((tmp_path / "digits.json").read_text())["runs"]
    assert compared == list(runs) == ["classes"]
    assert set(compare.CONTESTANTS) - set(runs["classes"]) == {
        "C-LoRA without its loss",
        "C-LoRA without the stopped path",
    }


@pytest.mark.parametrize(
    ("average", "learning", "told"),
    [
        (
            [0.05, 0.07],
            [0.03, 0.01],
            "average +6.0 ± 1.0, better by more than two standard errors; learning +2.0 ± 1.0, better by",
        ),
        (
            [0.05, 0.0],
            [0.01, 0.0],
            "average +2.5 ± 2.5, within two standard errors: no difference is shown; learning +0.5 ± 0.5, within",
        ),
        (
            [-0.06, -0.06],
            [-0.02, -0.02],
            "-6.0 ± 0.0, WORSE by more than two standard errors; learning -2.0 ± 0.0, worse by",
        ),
    ],
)
def test_the_verdict_in_words(examples, average, learning, told) -> None:
    mine = [{"average": 0.5 + a, "learning": 0.5 + g} for a, g in zip(average, learning, strict=True)]
    assert told in examples[0].verdict("SLAO", mine, [{"average": 0.5, "learning": 0.5}] * 2)


def test_one_seed_shows_no_difference(examples) -> None:
    for gain in (0.01, -0.01):
        told = examples[0].verdict(
            "DAC", [{"average": 0.5 + gain, "learning": 0.5}], [{"average": 0.5, "learning": 0.5}]
        )
        assert f"average {100 * gain:+.1f} ± nan, within two standard errors: no difference is shown" in told


def test_few_seeds_decide_nothing_also_where_no_table_is_at_hand(examples, monkeypatch, tmp_path) -> None:
    compare, _ = examples
    for scenario in ("classes", "domains"):
        told = compare.caution(1, scenario)
        assert told.startswith("1 seed decides nothing") and "The 10 seeds of" in told
    monkeypatch.setattr(compare, "PUBLISHED", tmp_path / "digits.json")
    assert compare.caution(5, "classes") == (
        "5 seeds decide nothing, whatever stands above: the class orders differ too much; 10 were published"
    )


@pytest.mark.parametrize(("argv", "env"), [(["--seeds", "101"], "5"), (["--seeds", "0"], "5"), ([], "101")])
def test_seeds_that_are_for_tuning_are_refused(examples, argv, env, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_on_digits.py", *argv])
    monkeypatch.setenv("SEEDS", env)
    with pytest.raises(SystemExit) as exit_:
        examples[0].main()
    assert exit_.value.code == 2 and "expected 1 to 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "env", "message"),
    [
        ([], "abc", "argument --seeds: invalid int value: 'abc'"),
        (["--workers", "0"], "5", "--workers: got 0, expected at least 1"),
        (["--out", f"{__file__}/results"], "5", "--out: [Errno 20] Not a directory"),
    ],
)
def test_wrong_options_are_told_before_anything_is_computed(examples, argv, env, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_on_digits.py", *argv])
    monkeypatch.setenv("SEEDS", env)
    monkeypatch.setattr(examples[0], "ProcessPoolExecutor", None)
    with pytest.raises(SystemExit) as exit_:
        examples[0].main()
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_extra_is_named(examples, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("sklearn", "tqdm") else find(name, *a)
    )
    monkeypatch.setattr(sys, "argv", ["compare_on_digits.py"])
    with pytest.raises(SystemExit, match=r"needs sklearn, tqdm.*pip install 'clora_kernels\[demo\]'"):
        examples[0].main()
