"""One run of a continual-learning method over the tasks of digits."""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from digits import EPOCHS, HIDDEN, Samples, Settings, Stream, batches, classify, make_optimizer
from torch import Tensor, nn

from clora_kernels.continual import ContinualMethod, CosineHead, Prototypes, TaskAccuracies, TaskReport
from clora_kernels.testing import peak_memory


class Run(NamedTuple):
    """What one method did on one stream."""

    accuracies: TaskAccuracies
    reports: list[TaskReport]


class Cost(NamedTuple):
    """Of a training step: the median time and the peak of memory."""

    seconds: float
    bytes: int


MakeMethod = Callable[[nn.Module], ContinualMethod]


def run(
    stream: Stream, make_method: MakeMethod, settings: Settings | None, joint: bool = False, repeat: int = 0
) -> Run:
    """Learn the tasks of ``stream`` one after the other and test after each; ``joint``: instead of going on, start anew
    each time, with the data of all tasks so far. ``repeat``: which draw of adapters, heads and batches."""
    torch.manual_seed(stream.seed + 1000 * repeat)
    tasks = len(stream.train)
    accuracy, masked = torch.full((tasks, tasks), torch.nan), torch.zeros(tasks)
    reports = []
    for i in range(tasks):
        if i == 0 or joint:
            method, prototypes = make_method(copy.deepcopy(stream.backbone)), Prototypes()
        new = stream.train[: i + 1] if joint else stream.train[i : i + 1]
        reports.append(learn(method, Samples.of_all(new), stream, settings))
        for samples in new if stream.head is None else []:
            prototypes.add_task(method.outputs(samples.images)[-1], samples.labels)
        for j, (images, labels) in enumerate(stream.test[: i + 1]):
            views = method.outputs(images)
            accuracy[i, j] = (predict(stream.head or prototypes, views) == labels).double().mean()
            if j == i:
                masked[i] = (predict(stream.head or prototypes, views, task=i + 1) == labels).double().mean()
    samples = torch.tensor([len(test.labels) for test in stream.test])
    return Run(TaskAccuracies(accuracy, masked, samples), reports)


def predict(classifier: nn.Module | Prototypes, views: list[Tensor], task: int | None = None) -> Tensor:
    """The class of each sample from its features in every view: by the prototypes of the tasks so far, or by a head of
    all classes, where the view whose answer is the most certain counts. Told the task, by what that one brought."""
    if isinstance(classifier, Prototypes):
        return classifier.predict(views[0] if len(views) == 1 else views, task)
    seen = views if task is None or len(views) == 1 else views[task - 1 : task]
    certainty, classes = torch.stack([classifier(features).softmax(-1) for features in seen]).max(-1)
    return classes.gather(0, certainty.argmax(0, keepdim=True)).squeeze(0)


def mean_of(runs: list[Run]) -> Run:
    """Several runs of a method on one stream as one: their mean accuracies, the reports of the first."""
    seen = [r.accuracies for r in runs]
    accuracy, masked = (torch.stack([getattr(a, k) for a in seen]).mean(0) for k in ("accuracy", "task_masked"))
    return Run(TaskAccuracies(accuracy, masked, seen[0].samples), runs[0].reports)


def learn(
    method: ContinualMethod, samples: Samples, stream: Stream, settings: Settings | None, epochs: int | None = None
) -> TaskReport:
    """One task, from its beginning to its end."""
    for step in begin(method, samples, stream, settings, epochs):
        step()
    return method.end_task()


def begin(
    method: ContinualMethod, samples: Samples, stream: Stream, settings: Settings | None, epochs: int | None = None
) -> list[Callable[[], object]]:
    """The training steps of a task that begins, none for a method that does not train in it: through the head of all
    tasks where there is one; else through a cosine head of its own, trained with the adapters on its classes alone."""
    classes = samples.labels.unique()
    # A method that never trains has no settings, and no use for a head.
    head = stream.head or (CosineHead(HIDDEN, len(classes), settings.head_scale) if settings else None)
    method.begin_task(head)
    if not method.trainable():
        return []
    groups = method.param_groups(settings.lr)
    if stream.head is None:
        groups = [*groups, {"params": list(head.parameters()), "lr": settings.lr}]
    optimizer = make_optimizer(settings, groups)
    shuffled = batches(samples, EPOCHS[stream.scenario] if epochs is None else epochs)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(shuffled))
    method.model.train()

    def step(images: Tensor, labels: Tensor) -> None:
        labels = labels if stream.head else torch.searchsorted(classes, labels)
        method.training_step(images, functools.partial(classify, method.model, head, images, labels), optimizer)
        schedule.step()

    return [functools.partial(step, *batch) for batch in shuffled]


def step_costs(
    stream: Stream, contestants: dict[str, tuple[MakeMethod, Settings]], rounds: int = 30
) -> dict[str, Cost]:
    """What a step costs in the second task of ``stream``, for the methods that train in it: their steps take turns in
    this process, so that whatever else the machine does disturbs all of them alike."""
    todo = {}
    for name, (make_method, settings) in contestants.items():
        torch.manual_seed(stream.seed)
        method = make_method(copy.deepcopy(stream.backbone))
        first, second = stream.train[:2]
        learn(method, first, stream, settings, epochs=1)
        if steps := begin(method, second, stream, settings):
            todo[name] = itertools.cycle(steps)
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(rounds):
        for name, steps in todo.items():
            step = next(steps)
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: Cost(statistics.median(seconds[name]), peak_memory(next(steps))[1]) for name, steps in todo.items()}
