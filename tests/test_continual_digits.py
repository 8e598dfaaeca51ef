"""The comparison on digits: its data, one short run of every contestant, what it prints and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def examples():
    """The example's modules, with short trainings."""
    sys.path.insert(0, str(EXAMPLES))
    patch = pytest.MonkeyPatch()
    patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    patch.setenv("KINETO_LOG_LEVEL", "99")
    try:
        import compare_on_digits
        import digits

        patch.setattr(digits, "PRETRAINING_EPOCHS", 1)
        # learn() takes the number of epochs as a default, and a meter the step of which it takes the memory.
        patch.setattr(digits.learn, "__defaults__", (1,))
        patch.setattr(digits.StepMeter.__init__, "__defaults__", (1,))
        yield compare_on_digits, digits
    finally:
        patch.undo()
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def stream(examples):
    return examples[1].make_stream(0)


@pytest.fixture(scope="module")
def short(examples, stream):
    """The stream with a fifth of its samples."""
    cut = {k: examples[1].Samples(*(t[::5] for t in getattr(stream, k))) for k in ("train", "test")}
    return dataclasses.replace(stream, **cut)


def test_the_split_is_stratified_and_the_tasks_share_no_class(stream) -> None:
    n_train, n_test = len(stream.train.labels), len(stream.test.labels)
    assert (n_train + n_test, n_test) == (1797, 540)
    for c in range(10):
        share = len(stream.test.of([c]).labels) / (len(stream.train.of([c]).labels) + len(stream.test.of([c]).labels))
        assert abs(share - 0.3) < 0.01
    assert [len(t) for t in stream.tasks] == [2, 2, 2] and len({c for t in stream.tasks for c in t}) == 6
    assert stream.train.images.shape == (1257, 1, 8, 8)
    assert (stream.train.images.min(), stream.train.images.max()) == (0, 1)
    assert not any(p.requires_grad for p in stream.backbone.parameters())


def same(a, b) -> bool:
    lower = torch.tril_indices(3, 3).unbind()
    return torch.equal(a.accuracy[lower], b.accuracy[lower]) and torch.equal(a.task_masked, b.task_masked)


def test_every_contestant_runs_and_repeats_itself(examples, short) -> None:
    compare, digits = examples
    settings = digits.Settings("sgd", 0.02, 10.0)
    runs = {name: compare.run_contestant(short, name, settings) for name in compare.CONTESTANTS}
    assert same(compare.run_contestant(short, compare.CLORA, settings).accuracies, runs[compare.CLORA].accuracies)
    for name, run in runs.items():
        assert run.accuracies.accuracy[0, 0] == run.accuracies.task_masked[0]
        trains = name != "frozen backbone"
        assert (run.trainable > 0, run.step_seconds is not None, run.step_bytes is not None) == (trains,) * 3, name
    # r·(K + N) of q, v, fc1 and fc2 in four blocks; C-LoRA has its r² beside them.
    lora = 4 * 8 * (2 * (64 + 64) + (64 + 128) + (128 + 64))
    assert runs[compare.LORA].trainable == lora and runs[compare.CLORA].trainable == lora + 16 * 64
    drifts = [report.measures["drift"] for report in runs[compare.CLORA].reports]
    assert drifts[0] is None and all(0 < d < 1 for d in drifts[1:])


def test_runs_of_one_seed_are_averaged(examples, short) -> None:
    compare, digits = examples
    settings = digits.Settings("sgd", 0.05, 10.0)
    one, other = (compare.run_contestant(short, compare.CLORA, settings, repeat) for repeat in (0, 1))
    assert not torch.equal(one.accuracies.accuracy, other.accuracies.accuracy), "another draw"
    mean = digits.mean_of([one, other])
    for name in ("accuracy", "task_masked"):
        a, b, both = (getattr(run.accuracies, name) for run in (one, other, mean))
        torch.testing.assert_close(both, (a + b) / 2, equal_nan=True)
    assert min(one.step_seconds, other.step_seconds) <= mean.step_seconds <= max(one.step_seconds, other.step_seconds)
    assert mean.step_bytes == max(one.step_bytes, other.step_bytes)


def test_the_whole_comparison_writes_what_it_says(examples, short, tmp_path, capsys, monkeypatch) -> None:
    compare, _ = examples
    monkeypatch.setattr(compare, "make_stream", lambda seed: dataclasses.replace(short, seed=seed))
    with ThreadPoolExecutor(1) as pool:
        compare.compare(pool, range(2), 2, tmp_path)
    out = capsys.readouterr().out
    for name in compare.CONTESTANTS:
        assert f"| {name} " in out
    published = (EXAMPLES / "results" / "digits.md").read_text()
    assert (
        "2 seeds of 2 runs each" in out
        and "2 seeds decide nothing" in out
        and out.count("C-LoRA over tuned LoRA: average") == 2
    )
    assert next(line for line in published.splitlines() if line.startswith("C-LoRA over tuned LoRA: ")) in out
    assert "the earlier tasks' path moved by" in out
    for dtype in ("float32", "bfloat16"):
        assert f"parity with fp64, C-LoRA, {dtype}: " in out and "of 16 layers" in out
    assert (tmp_path / "digits.md").read_text().strip() in out
    runs = json.loads((tmp_path / "digits.json").read_text())["runs"]
    assert {name: [r["seed"] for r in of] for name, of in runs.items()} == {n: [0, 1] for n in compare.CONTESTANTS}
    assert all((tmp_path / f"digits_{x}.png").stat().st_size > 5000 for x in ("accuracy", "forgetting"))


@pytest.mark.parametrize(
    ("average", "learning", "told"),
    [
        (
            [0.05, 0.07],
            [0.03, 0.01],
            "average +6.0 ± 1.0, more than two standard errors; learning +2.0 ± 1.0, better by",
        ),
        (
            [0.05, 0.0],
            [0.01, 0.0],
            "average +2.5 ± 2.5, NOT more than two standard errors; learning +0.5 ± 0.5, within",
        ),
        (
            [-0.06, -0.06],
            [-0.02, -0.02],
            "-6.0 ± 0.0, NOT more than two standard errors; learning -2.0 ± 0.0, worse by",
        ),
    ],
)
def test_the_verdict_in_words(examples, average, learning, told) -> None:
    mine = [{"average": 0.5 + a, "learning": 0.5 + g} for a, g in zip(average, learning, strict=True)]
    assert told in examples[0].verdict(mine, [{"average": 0.5, "learning": 0.5}] * 2)


def test_few_seeds_decide_nothing_also_where_no_table_is_at_hand(examples, monkeypatch, tmp_path) -> None:
    compare, _ = examples
    assert compare.caution(1).startswith("1 seed decides nothing") and "The 10 seeds of" in compare.caution(1)
    monkeypatch.setattr(compare, "PUBLISHED", tmp_path / "digits.json")
    assert compare.caution(5) == (
        "5 seeds decide nothing, whatever stands above: the class orders differ too much; 10 were published"
    )


def test_tuned_settings_are_the_best_of_what_was_tried_on_other_seeds(examples) -> None:
    compare, digits = examples
    record = json.loads(compare.TUNED.read_text())
    assert record["command"] == "python examples/compare_on_digits.py --tune"
    assert min(record["seeds"]) >= 100 and record["seeds"] == list(compare.TUNING_SEEDS)
    assert record["methods"].keys() == {name for name, c in compare.CONTESTANTS.items() if c.grid}
    for name, method in record["methods"].items():
        tried = [digits.Settings(*(t[k] for k in digits.Settings._fields)) for t in method["tried"]]
        assert tried == compare.CONTESTANTS[name].grid
        assert method["best"] == max(method["tried"], key=lambda t: t["average"])
        assert compare.tuned_settings()[name] == digits.Settings(*(method["best"][k] for k in digits.Settings._fields))


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
