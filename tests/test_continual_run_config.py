"""What a run was started with: it may learn further tasks, and tells by which packages it was started."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS
from sequences import Net, batch
from torch import Tensor

from clora_kernels import __version__
from clora_kernels.continual import RunDirectory
from clora_kernels.continual import run_config as module

CONFIG = {"lr": 0.1, "tasks": ["a", "b"], "samples": [[3, 1], [4, 1]]}
LONGER = {**CONFIG, "tasks": ["a", "b", "c"], "samples": [[3, 1], [4, 1], [5, 2]]}
GROWING = ("tasks", "samples")


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def learn(path: Path, config: dict, base: Net, growing: tuple[str, ...] = (), steps: int = 3) -> dict[str, Tensor]:
    """Every task of ``config`` that was not learned yet; ``steps``: of the last one, which else ends."""
    torch.manual_seed(3)
    run, method = RunDirectory(path), METHODS["c-lora"](copy.deepcopy(base), dropout_p=0.25)
    saved = run.load(method) if run.start(config, resume=True, growing=growing) else None
    method.listeners.append(run.listener)
    for task in range(method.task + (not method.in_task), len(config["tasks"]) + 1):
        begun = method.in_task
        if not begun:
            method.begin_task()
        optimizer = torch.optim.SGD(method.param_groups(0.1), momentum=0.9)
        if saved:
            saved.restore(**({"optimizer": optimizer} if begun else {}))
            saved = None
        last = task == len(config["tasks"])
        for number in range(run.step, steps if last else 3):
            x, labels = batch(task, number)
            method.training_step(x, lambda x=x, y=labels: F.cross_entropy(method.model(x), y), optimizer)
        if last and steps < 3:
            run.save(method, optimizer=optimizer)
            break
        method.end_task()
        run.save(method)
    return method.state_dict()


def told(path: Path) -> list[tuple]:
    return [(li["event"], li["task"], li["values"]) for li in RunDirectory(path).lines() if li["event"] != "resume"]


@pytest.mark.parametrize("steps", [3, 1])
def test_a_run_takes_further_tasks_and_is_as_if_it_had_had_them_from_the_start(steps: int, tmp_path: Path) -> None:
    """After its end, and within its last task."""
    base = Net()
    expected = learn(tmp_path / "whole", LONGER, base)
    learn(tmp_path / "grown", CONFIG, base, steps=steps)
    got = learn(tmp_path / "grown", LONGER, base, GROWING)
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
    assert int(got["task"]) == 3 and config_of(tmp_path / "grown") == config_of(tmp_path / "whole")
    steps_of = [[line for line in told(tmp_path / name) if line[0] != "step"] for name in ("grown", "whole")]
    assert steps_of[0] == steps_of[1]
    with pytest.raises(ValueError, match=r"tasks \(\['a', 'b'\], \['a', 'b', 'c'\]\)"):
        RunDirectory(tmp_path / "grown").start(CONFIG, resume=True, growing=GROWING)


@pytest.mark.parametrize(
    ("change", "growing", "told"),
    [
        ({}, (), r"samples \(.*; tasks \(.*\)$"),
        ({}, ("tasks",), r"\(got, expected\) samples \(.*\); tasks may be longer, but must begin as there$"),
        (
            {"tasks": ["a", "x", "c"]},
            GROWING,
            r"\(got, expected\) tasks \(\['a', 'x', 'c'\], \['a', 'b'\]\); samples, t",
        ),
        ({"tasks": ["c", "a", "b"]}, GROWING, r"\(got, expected\) tasks "),
        ({"tasks": ["a"]}, GROWING, r"\(got, expected\) tasks "),
        ({"tasks": None}, GROWING, r"\(got, expected\) tasks \(None, "),
        ({"samples": [[3, 1], [4, 2], [5, 2]]}, GROWING, r"\(got, expected\) samples "),
        ({"lr": 0.2}, GROWING, r"\(got, expected\) lr \(0\.2, 0\.1\); samples, tasks may be longer"),
    ],
)
def test_whatever_else_differs_is_refused_by_its_name(change: dict, growing: tuple, told: str, tmp_path: Path) -> None:
    learn(tmp_path, CONFIG, Net())
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=told):
        RunDirectory(tmp_path).start({**LONGER, **change}, resume=True, growing=growing)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_config_tells_by_which_packages_a_run_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    base = Net()
    learn(tmp_path, CONFIG, base)
    started = {"clora_kernels": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    assert config_of(tmp_path) == {**CONFIG, "versions": started}
    with pytest.raises(ValueError, match="config: got 'versions', expected a config without"):
        RunDirectory(tmp_path).start({**CONFIG, "versions": {}}, resume=True)

    def absent(name: str) -> str:
        raise module.metadata.PackageNotFoundError(name)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RunDirectory(tmp_path).start(CONFIG, resume=True)
    monkeypatch.setattr(module.metadata, "version", absent)
    with pytest.warns(
        UserWarning, match=r"versions: the run in '.*' was started with \{.*'transformers': .*now there are"
    ):
        assert RunDirectory(tmp_path).start(CONFIG, resume=True)
    assert config_of(tmp_path)["versions"] == started
    learn(tmp_path / "new", CONFIG, base)
    assert config_of(tmp_path / "new")["versions"].keys() == {"clora_kernels", "torch"}
    # One that was started before there were any is let be.
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RunDirectory(tmp_path).start(CONFIG, resume=True) and config_of(tmp_path) == CONFIG
