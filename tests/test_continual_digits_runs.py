"""One run on tasks of digits, with a method that writes down what it is asked and a few numbers in place of images."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clora_kernels.continual import Prototypes, TaskReport

LR = 0.5


class Recorder:
    """A method with as many views as tasks have begun: view i of an image [views, 2] is its row i."""

    def __init__(self, model: nn.Module, learns: bool = True) -> None:
        self.model, self.learns, self.task = model.requires_grad_(), learns, 0
        self.heads: list[nn.Module] = []
        self.began_with: list[dict[str, Tensor]] = []
        self.rates: list[list[float]] = []
        self.seen: list[list[Tensor]] = []
        self.training: list[bool] = []
        self.optimizer: Any = None

    def state(self) -> dict[str, Tensor]:
        parts = {"model": self.model, "head": self.heads[-1]}
        return {f"{p}.{k}": v.clone() for p, module in parts.items() for k, v in module.state_dict().items()}

    def begin_task(self, head: nn.Module) -> None:
        self.task += 1
        self.heads.append(head)
        self.began_with.append(self.state())
        self.rates.append([])
        self.seen.append([])

    def trainable(self) -> list[nn.Parameter]:
        return list(self.model.parameters()) if self.learns else []

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": self.trainable(), "lr": lr}]

    def training_step(self, inputs: Tensor, task_loss: Any, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.seen[-1].append(inputs)
        self.training.append(self.model.training)
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        self.rates[-1].append(rate)
        optimizer.zero_grad()
        task_loss().backward()
        optimizer.step()

    def end_task(self) -> TaskReport:
        return TaskReport(self.task, 7 - self.task, 10 * self.task)

    def outputs(self, images: Tensor) -> list[Tensor]:
        return [images[:, i] for i in range(self.task)]


@pytest.fixture
def runs(examples, monkeypatch):
    """The module, with three epochs a task."""
    import digits_runs

    monkeypatch.setitem(examples[1].EPOCHS, "classes", 3)
    monkeypatch.setitem(examples[1].EPOCHS, "domains", 3)
    return digits_runs


def samples(examples, views: dict[int, list[list[float]]], times: int = 1):
    """An image [2, 2] of each class, several times."""
    images = torch.tensor(list(views.values())).repeat(times, 1, 1)
    return examples[1].Samples(images, torch.tensor(list(views)).repeat(times))


@pytest.fixture
def by_views(examples):
    """Two tasks of two classes. In view 1 the classes 4 and 7 of the second are one, view 2 tells them apart; a test
    image of class 4 is nearer to class 2 of the first task than to its own."""
    east, north, between = [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]
    train = [{2: [east, between], 5: [north, between]}, {4: [between, east], 7: [between, north]}]
    test = [train[0], {4: [east, [1.0, 0.5]], 7: [between, north]}]
    parts = [[samples(examples, task, times) for task in tasks] for tasks, times in ((train, 20), (test, 1))]
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, examples[1].HIDDEN))
    return examples[1].Stream(0, "classes", *parts, backbone, None)


def make_recorders(made: list[Recorder], **options: Any) -> Any:
    def make(backbone: nn.Module) -> Recorder:
        made.append(Recorder(backbone, **options))
        return made[-1]

    return make


def settings(examples) -> Any:
    return examples[1].Settings("sgd", LR, 10.0)


def test_class_means_are_of_the_newest_view_and_a_told_task_counts(examples, runs, by_views) -> None:
    made: list[Recorder] = []
    run = runs.run(by_views, make_recorders(made), settings(examples))
    (method,) = made
    (before, none), after = run.accuracies.accuracy.tolist()
    assert before == 1.0 and math.isnan(none) and after == [1.0, 0.5]
    assert run.accuracies.task_masked.tolist() == [1.0, 1.0] and run.accuracies.samples.tolist() == [2, 2]
    assert [(r.task, r.trainable, r.stored) for r in run.reports] == [(1, 6, 10), (2, 5, 20)]
    # Three epochs of 40 samples, 32 and the rest: of one task's images alone, each once an epoch.
    for seen, task in zip(method.seen, by_views.train, strict=True):
        assert [len(batch) for batch in seen] == [32, 8] * 3
        for epoch in range(3):
            images = torch.cat(seen[2 * epoch : 2 * epoch + 2])
            assert torch.equal(images.flatten(1).sort(0).values, task.images.flatten(1).sort(0).values), (
                f"epoch {epoch} of other images"
            )


def test_a_head_of_all_tasks_is_asked_with_and_without_the_task_and_never_trained(examples, runs) -> None:
    east, north, sure = [1.0, 0.0], [0.0, 1.0], [9.0, 0.0]
    train = {0: [east, east], 1: [north, north]}
    # In the second task view 1 is certain of a wrong class, view 2 right with less of it.
    parts = [[samples(examples, task) for task in tasks] for tasks in ([train, train], [train, {1: [sure, north]}])]
    head = nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
        head.bias.zero_()
    stream = examples[1].Stream(
        0, "domains", *parts, nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), head.requires_grad_(False)
    )
    made: list[Recorder] = []
    run = runs.run(stream, make_recorders(made), settings(examples))
    assert run.accuracies.accuracy[1].tolist() == [1.0, 0.0] and run.accuracies.task_masked.tolist() == [1.0, 1.0]
    assert made[0].heads == [head, head] and torch.equal(head.weight, torch.eye(2)) and not head.bias.any()
    assert len(made[0].optimizer.param_groups) == 1


def test_jointly_each_task_starts_anew_with_the_data_of_all_so_far(examples, runs, by_views) -> None:
    made: list[Recorder] = []
    before = {k: v.clone() for k, v in by_views.backbone.state_dict().items()}
    run = runs.run(by_views, make_recorders(made), settings(examples), joint=True)
    assert [method.task for method in made] == [1, 1] and made[0].model is not made[1].model
    for method, batches in zip(made, ([32, 8], [32, 32, 16]), strict=True):
        assert [len(batch) for batch in method.seen[0]] == batches * 3
        start = method.began_with[0]
        assert all(torch.equal(start[f"model.{k}"], v) for k, v in before.items())
    assert all(torch.equal(v, before[k]) for k, v in by_views.backbone.state_dict().items())
    assert [head.weight.shape[0] for method in made for head in method.heads] == [2, 4]
    # One view, and class means of all four classes in it: those of 4 and 7 are one, of which 4 comes first.
    assert run.accuracies.accuracy[1].tolist() == [1.0, 0.0] and run.accuracies.task_masked[1] == 0.5


def test_a_task_trains_adapters_and_head_in_training_mode_down_to_a_rate_of_zero(examples, runs, by_views) -> None:
    method = Recorder(by_views.backbone.eval())
    report = runs.learn(method, by_views.train[1], by_views, settings(examples))
    assert (report.task, method.training) == (1, [True] * 6)
    assert method.rates[0] == pytest.approx([LR * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)])
    assert [group["lr"] for group in method.optimizer.param_groups] == pytest.approx([0.0, 0.0], abs=1e-12)
    (head,) = method.heads
    assert head.scale != 10.0 and method.began_with[0]["head.scale"] == 10.0
    start, end = method.began_with[0], method.state()
    assert start.keys() == end.keys() and not any(torch.equal(start[name], end[name]) for name in start)
    learning = [p for group in method.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in learning} == {id(p) for p in (*method.model.parameters(), *head.parameters())}


def test_a_method_that_does_not_learn_makes_no_step(examples, runs, by_views) -> None:
    made: list[Recorder] = []
    run = runs.run(by_views, make_recorders(made, learns=False), settings(examples))
    assert made[0].seen == [[], []]
    assert run.accuracies.task_masked.tolist() == [1.0, 1.0]


def test_the_classes_of_a_run_go_to_the_prototypes_by_their_names(examples, runs, by_views, monkeypatch) -> None:
    added: list[tuple[Tensor, Tensor]] = []

    class Told(Prototypes):
        def add_task(self, features: Tensor, labels: Tensor) -> None:
            added.append((features, labels))
            super().add_task(features, labels)

    monkeypatch.setattr(runs, "Prototypes", Told)
    runs.run(by_views, make_recorders([]), settings(examples))
    for i, ((features, labels), task) in enumerate(zip(added, by_views.train, strict=True)):
        assert torch.equal(features, task.images[:, i]) and torch.equal(labels, task.labels)


def test_steps_are_timed_in_turns_in_the_second_task(examples, runs, by_views, monkeypatch) -> None:
    """A clock that goes on by what a step says: one step in three is slow, which a median does not see."""
    clock, turns, made = [0.0], [], []
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Timed(Recorder):
        def training_step(self, *arguments: Any) -> None:
            super().training_step(*arguments)
            if self.task == 2:
                clock[0] += self.seconds * (100 if len(self.seen[-1]) % 3 == 0 else 1)
                turns.append(self.seconds)

    def timed(seconds: float, learns: bool = True) -> Any:
        def make(backbone: nn.Module) -> Timed:
            made.append(Timed(backbone, learns))
            made[-1].seconds = seconds
            return made[-1]

        return make, settings(examples)

    contestants = {"quick": timed(1.0), "idle": timed(9.0, learns=False), "slow": timed(2.0)}
    costs = runs.step_costs(by_views, contestants, rounds=7)
    assert {name: cost.seconds for name, cost in costs.items()} == {"quick": 1.0, "slow": 2.0}
    assert turns == [1.0, 2.0] * 8, "seven rounds and a step each for the memory"
    assert all(cost.bytes > 0 for cost in costs.values())
    assert [len(method.seen[0]) for method in made] == [2, 0, 2], "an epoch of the first task"
    timed_on = torch.cat(made[0].seen[1][:2]).flatten(1).sort(0).values
    assert torch.equal(timed_on, by_views.train[1].images.flatten(1).sort(0).values)
    assert len({id(method.model) for method in made} | {id(by_views.backbone)}) == 4


def test_the_columns_of_costs_are_those_of_the_last_and_of_the_largest_task(examples, runs) -> None:
    reports = [TaskReport(1, 30, 100), TaskReport(2, 50, 200), TaskReport(3, 40, 300)]
    found = examples[0].costs(reports, runs.Cost(0.0012, 3 * 10**6))
    assert found == {"trained": "50", "stored": "100 → 300", "ms a step": "1.2", "MB a step": "3.0"}
    assert examples[0].costs(reports[:1], None) == {
        "trained": "30",
        "stored": "100",
        "ms a step": "-",
        "MB a step": "-",
    }
    assert examples[0].costs([TaskReport(1, 0, 100)], None)["stored"] == "0"
