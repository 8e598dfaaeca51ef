"""The folder of a run: stopped anywhere it goes on bit for bit, and what does not fit is refused with the folder as it
was."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS
from sequences import Net, batch
from torch import nn

from clora_kernels.continual import Prototypes, RunDirectory, save_run
from clora_kernels.continual import run_directory as module

CONFIG = {"lr": 0.1, "method": "any", "targets": ["first"]}
TASKS, STEPS, SAVE_EVERY, EVERY = 3, 7, 3, 2


class Killed(BaseException):
    """As a signal, nothing that a handler of errors catches."""


def learn(path: Path, name: str, base: Net, resume: bool = False, kill_at: tuple[int, int] | None = None) -> Any:
    """Tasks with a head each, saved every third step and after each test; method and prototypes at the end."""
    torch.manual_seed(3)
    run = RunDirectory(path, every=EVERY)
    method, prototypes = METHODS[name](copy.deepcopy(base), dropout_p=0.25), Prototypes()
    resumes = run.start(CONFIG, resume)
    method.listeners.append(run.listener)
    saved = run.load(method) if resumes else None
    if saved and not method.in_task:
        saved.restore(prototypes=prototypes)
    for task in range(method.task + (not method.in_task), TASKS + 1):
        head = nn.Linear(3, 3)
        begun = method.in_task
        if not begun:
            method.begin_task(head)
        groups = [*method.param_groups(0.1), {"params": list(head.parameters())}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        if begun:
            saved.restore(head=head, optimizer=optimizer, prototypes=prototypes)
        for number in range(run.step, STEPS):
            x, labels = batch(task, number)
            if (task, number) == kill_at:
                raise Killed
            method.training_step(x, lambda x=x, y=labels, h=head: F.cross_entropy(h(method.model(x)), y), optimizer)
            if run.step % SAVE_EVERY == 0:
                run.save(method, head=head, optimizer=optimizer, prototypes=prototypes)
        method.end_task()
        with method.inference() as model, torch.no_grad():
            prototypes.add_task(model(x), labels + 10 * task)
            found = [float(model(batch(j, 99)[0]).sigmoid().mean()) for j in range(1, task + 1)]
        run.record(task, found, found[-1], [8] * task, loss=[0.5] * task)
        run.save(method, prototypes=prototypes)
    return run, {**method.state_dict(), "means": torch.cat(prototypes.means), "rng": torch.get_rng_state()}


def told(run: RunDirectory) -> list[dict[str, Any]]:
    """What the log tells, but for times and where the run was resumed."""
    return [{k: v for k, v in line.items() if k != "time"} for line in run.lines() if line["event"] != "resume"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


KILLS = [(1, 0), (1, 2), (1, 3), (1, 5), (2, 0), (2, 1), (2, 3), (2, 6), (3, 6)]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_killed_in_training_goes_on_bit_for_bit(name: str, tmp_path) -> None:
    base = Net()
    whole, expected = learn(tmp_path / "whole", name, base)
    for task, step in KILLS:
        path = tmp_path / f"{task}-{step}"
        with pytest.raises(Killed):
            learn(path, name, base, kill_at=(task, step))
        resumed, got = learn(path, name, base, resume=True)
        assert same(got, expected) and told(resumed) == told(whole), (task, step)
        accuracy, again = (r.accuracies().accuracy[torch.tril_indices(TASKS, TASKS).unbind()] for r in (whole, resumed))
        assert torch.equal(accuracy, again)


@pytest.mark.parametrize("call", range(1, 10))
@pytest.mark.parametrize("moment", ["before the file", "the file half written", "before it is in place", "after"])
def test_a_run_killed_while_it_saves_goes_on_bit_for_bit(call: int, moment: str, tmp_path, monkeypatch) -> None:
    """At each of the nine times it saves: once log and checkpoint are in step, once the log is ahead."""
    base = Net()
    whole, expected = learn(tmp_path / "whole", "c-lora", base)
    import safetensors.torch

    write, save, calls = safetensors.torch.save_file, module.save_run, []

    def half(tensors: Any, path: Path, **kw: Any) -> None:
        if len(calls) < call:
            return write(tensors, path, **kw)
        if moment == "the file half written":
            Path(path).write_bytes(b"half of a file")
        elif moment == "before it is in place":
            write(tensors, path, **kw)
        raise Killed

    def counted(*args: Any, **kw: Any) -> Path:
        calls.append(1)
        if len(calls) == call and moment == "before the file":
            raise Killed
        done = save(*args, **kw)
        if len(calls) == call:
            raise Killed
        return done

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_run", counted)
        if moment not in ("before the file", "after"):
            patch.setattr(safetensors.torch, "save_file", half)
        with pytest.raises(Killed):
            learn(tmp_path / "run", "c-lora", base)
    resumed, got = learn(tmp_path / "run", "c-lora", base, resume=True)
    assert len(calls) == call and same(got, expected) and told(resumed) == told(whole)


@pytest.mark.parametrize("cut", [1, 20])
def test_half_a_line_beyond_the_checkpoint_is_cut_off(cut: int, tmp_path) -> None:
    base = Net()
    whole, expected = learn(tmp_path / "whole", "lora", base)
    with pytest.raises(Killed):
        learn(tmp_path / "run", "lora", base, kill_at=(2, 5))
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"time": 1.0, "event": "step"'[:cut])
    resumed, got = learn(tmp_path / "run", "lora", base, resume=True)
    assert same(got, expected) and told(resumed) == told(whole)
    (line,) = resumed.lines("resume")
    assert (line["task"], line["values"]) == (2, {"step": 3})


def test_a_finished_run_has_nothing_left_to_do(tmp_path) -> None:
    base = Net()
    run, state = learn(tmp_path, "c-lora", base)
    before = told(run)
    again, resumed = learn(tmp_path, "c-lora", base, resume=True)
    assert told(again) == before and same(resumed, state) and state["task"] == TASKS


def test_what_the_log_tells_of_a_task(tmp_path) -> None:
    run, _ = learn(tmp_path, "c-lora", Net())
    lines = [line for line in run.lines() if line["task"] == 2]
    assert [line["event"] for line in lines] == ["begin", *["step"] * 5, "end", "test"]
    assert all(line.keys() == {"time", "event", "task", "values"} and line["time"] > 1.7e9 for line in run.lines())
    # Every second step, and what is left where it saves or ends.
    assert [(li["values"]["step"], li["values"]["of"]) for li in lines[1:6]] == [(2, 2), (3, 1), (4, 1), (6, 2), (7, 1)]
    assert all(set(line["values"]["losses"]) == {"task", "orthogonality"} for line in lines[1:6])
    assert lines[6]["values"].keys() == {"trainable", "stored", "drift", "overlap"}
    assert lines[7]["values"]["loss"] == [0.5, 0.5]
    first = next(run.lines())
    assert (first["event"], first["task"], first["values"]) == ("run", 0, {"version": 1})


def test_a_line_of_steps_is_the_mean_and_waits_once(tmp_path, monkeypatch) -> None:
    run = RunDirectory(tmp_path, every=3)
    run.start(CONFIG)
    waits: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (waits.append(t.numel()), tolist(t))[1])
    steps = [{"task": 1.0, "extra": 4.0}, {"task": 2.0}, {"task": 6.0, "extra": 6.0}, {"task": math.inf}]
    for number, losses in enumerate(steps):
        assert len(waits) == number // 3
        run.listener("step", 1, {k: torch.tensor(v) for k, v in losses.items()})
    run.listener("end", 1, {"drift": None, "share": math.nan, "of": torch.tensor([1, 2])})
    assert waits == [2, 1, 2]
    assert [line["values"] for line in run.lines()][1:] == [
        {"step": 3, "of": 3, "losses": {"task": 3.0, "extra": 5.0}},
        {"step": 4, "of": 1, "losses": {"task": "inf"}},
        {"drift": None, "share": "nan", "of": [1, 2]},
    ]


def test_results_by_task(tmp_path) -> None:
    run = RunDirectory(tmp_path)
    run.start(CONFIG)
    assert run.accuracies() is None
    run.record(1, [0.5], 0.5, [4])
    with pytest.raises(ValueError, match="accuracy: got 1, expected one for each of 2 tasks"):
        run.record(2, [0.5], 0.5, [4, 5])
    with pytest.raises(ValueError, match="samples: got 1, expected one for each of 2 tasks"):
        run.record(2, [0.5, 0.1], 0.5, [4])
    run.record(2, [0.25, 1 / 3], 0.75, [4, 5])
    found = run.accuracies()
    assert found.accuracy[1].tolist() == [0.25, 1 / 3] and found.accuracy[0, 0] == 0.5
    assert (
        found.accuracy[0, 1].isnan() and found.task_masked.tolist() == [0.5, 0.75] and found.samples.tolist() == [4, 5]
    )
    run.record(4, [0.0] * 4, 0.0, [1] * 4)
    with pytest.raises(ValueError, match=r"log.jsonl: no results of the tasks \[3\], expected those of 1 to 4"):
        run.accuracies()


def contents(path: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_another_config_is_refused_by_the_names_that_differ(tmp_path) -> None:
    RunDirectory(tmp_path).start(CONFIG)
    before = contents(tmp_path)
    other = {"lr": 0.2, "targets": ["first"], "r": None}
    message = (
        r"config: differs from that of the run in '.*' in \(got, expected\) "
        r"lr \(0\.2, 0\.1\); method \(absent, 'any'\); r \(None, absent\)$"
    )
    with pytest.raises(ValueError, match=message):
        RunDirectory(tmp_path).start(other, resume=True)
    with pytest.raises(FileExistsError, match="holds a run, expected an empty folder or resume"):
        RunDirectory(tmp_path).start(CONFIG)
    assert contents(tmp_path) == before
    assert RunDirectory(tmp_path).start({**CONFIG, "targets": ("first",)}, resume=True) is False
    with pytest.raises(TypeError, match="JSON"):
        RunDirectory(tmp_path / "new").start({"model": nn.Linear(1, 1)})
    assert not contents(tmp_path / "new")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json', which is no JSON object"):
        RunDirectory(tmp_path).start(CONFIG, resume=True)


def test_a_log_of_another_version_is_refused(tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "VERSION", 7)
        RunDirectory(tmp_path).start(CONFIG)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"log\.jsonl: got version 7, expected 1"):
        RunDirectory(tmp_path).start(CONFIG, resume=True)
    assert contents(tmp_path) == before
    for text in ("", "[]\n", "something else\n"):
        (tmp_path / "log.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"log\.jsonl: got version None, expected 1"):
            RunDirectory(tmp_path).start(CONFIG, resume=True)


def test_folders_that_cannot_hold_a_run_are_refused(tmp_path, monkeypatch) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "run"):
        with pytest.raises(NotADirectoryError, match=r"path: got '.*file.*', where a file is, expected a folder"):
            RunDirectory(path)
    assert file.read_text() == "mine"
    for every in (0, 2.5, True, "3"):
        with pytest.raises(ValueError, match=f"every: got {every!r}, expected at least 1 step a line, an int"):
            RunDirectory(tmp_path / "run", every=every)
    assert not (tmp_path / "run").exists()

    def denied(*args: Any, **kw: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", denied)
        with pytest.raises(PermissionError, match=r"path: '.*run' cannot be written: .*Permission denied"):
            RunDirectory(tmp_path / "run").start(CONFIG)
        patch.setattr(Path, "mkdir", denied)
        with pytest.raises(PermissionError, match=r"path: got '.*new', which cannot be made: Permission denied"):
            RunDirectory(tmp_path / "new")


@pytest.mark.parametrize(("gone", "by"), [("config.json", "log.jsonl"), ("log.jsonl", "checkpoint.safetensors")])
def test_a_run_that_lacks_a_file_is_refused(gone: str, by: str, tmp_path) -> None:
    learn(tmp_path, "lora", Net())
    (tmp_path / gone).unlink()
    before = contents(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"holds {by} but no {gone}"):
        RunDirectory(tmp_path).start(CONFIG, resume=True)
    with pytest.raises(FileExistsError, match="holds a run"):
        RunDirectory(tmp_path).start(CONFIG)
    assert contents(tmp_path) == before


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path) -> None:
    run, _ = learn(tmp_path, "lora", Net())
    method = METHODS["lora"](Net())
    before, state = contents(tmp_path), {k: v.clone() for k, v in method.state_dict().items()}
    with pytest.raises(ValueError, match="missing"):
        run.load(METHODS["lora"](Net(), targets=["first"], dropout_p=0.25))
    with pytest.raises(ValueError, match=r"\{'method': 'SequentialLoRA'\}, expected \{'method': 'CLoRA'\}"):
        run.load(METHODS["c-lora"](Net()))
    assert contents(tmp_path) == before
    log = run.log_file.read_bytes()
    run.log_file.write_bytes(log[:-1])
    with pytest.raises(
        ValueError, match=rf"log\.jsonl: got {len(log) - 1} bytes, expected the checkpoint's {len(log)}"
    ):
        run.load(method)
    save_run(run.checkpoint_file, method)
    with pytest.raises(ValueError, match=r"expected a file that RunDirectory\.save wrote"):
        run.load(method)
    assert same(method.state_dict(), state)
    with pytest.raises(TypeError, match="run_directory"):
        run.save(method, run_directory=nn.Linear(1, 1))
