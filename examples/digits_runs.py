"""One run of a continual-learning method over the tasks of digits."""

from __future__ import annotations

import copy
import functools
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
    """What one method did on one stream. The median training step in seconds and the peak of one in bytes are None for
    a method that never trains."""

    accuracies: TaskAccuracies
    reports: list[TaskReport]
    step_seconds: float | None
    step_bytes: int | None


MakeMethod = Callable[[nn.Module], ContinualMethod]


def run(
    stream: Stream, make_method: MakeMethod, settings: Settings | None, joint: bool = False, repeat: int = 0
) -> Run:
    """Learn the tasks of ``stream`` one after the other and test after each; ``joint``: instead of going on, start anew
    each time, with the data of all tasks so far. ``repeat``: which draw of adapters, heads and batches."""
    torch.manual_seed(stream.seed + 1000 * repeat)
    tasks = len(stream.train)
    accuracy, masked = torch.full((tasks, tasks), torch.nan), torch.zeros(tasks)
    meter, reports = StepMeter(), []
    for i in range(tasks):
        if i == 0 or joint:
            method, prototypes = make_method(copy.deepcopy(stream.backbone)), Prototypes()
        new = stream.train[: i + 1] if joint else stream.train[i : i + 1]
        reports.append(learn(method, Samples.of_all(new), stream, settings, meter))
        for samples in new if stream.head is None else []:
            prototypes.add_task(method.outputs(samples.images)[-1], samples.labels)
        for j, (images, labels) in enumerate(stream.test[: i + 1]):
            views = method.outputs(images)
            accuracy[i, j] = (predict(stream.head or prototypes, views) == labels).double().mean()
            if j == i:
                masked[i] = (predict(stream.head or prototypes, views, task=i + 1) == labels).double().mean()
    samples = torch.tensor([len(test.labels) for test in stream.test])
    return Run(TaskAccuracies(accuracy, masked, samples), reports, meter.median(), meter.bytes)


def predict(classifier: nn.Module | Prototypes, views: list[Tensor], task: int | None = None) -> Tensor:
    """The class of each sample from its features in every view: by the prototypes of the tasks so far, or by a head of
    all classes, where the view whose answer is the most certain counts. Told the task, by what that one brought."""
    if isinstance(classifier, Prototypes):
        return classifier.predict(views[0] if len(views) == 1 else views, task)
    seen = views if task is None or len(views) == 1 else views[task - 1 : task]
    certainty, classes = torch.stack([classifier(features).softmax(-1) for features in seen]).max(-1)
    return classes.gather(0, certainty.argmax(0, keepdim=True)).squeeze(0)


def mean_of(runs: list[Run]) -> Run:
    """Several runs of a method on one stream as one: their mean accuracies, the median step, the highest peak."""
    seen = [r.accuracies for r in runs]
    accuracy, masked = (torch.stack([getattr(a, k) for a in seen]).mean(0) for k in ("accuracy", "task_masked"))
    seconds = [r.step_seconds for r in runs if r.step_seconds is not None]
    peaks = [r.step_bytes for r in runs if r.step_bytes is not None]
    return runs[0]._replace(
        accuracies=TaskAccuracies(accuracy, masked, seen[0].samples),
        step_seconds=statistics.median(seconds) if seconds else None,
        step_bytes=max(peaks, default=None),
    )


def learn(
    method: ContinualMethod,
    samples: Samples,
    stream: Stream,
    settings: Settings | None,
    meter: StepMeter,
    epochs: int | None = None,
) -> TaskReport:
    """One task, through the head of all tasks where there is one; else through a cosine head of its own, trained with
    the adapters on the task's classes alone."""
    classes = samples.labels.unique()
    # A method that never trains has no settings, and no use for a head.
    head = stream.head or (CosineHead(HIDDEN, len(classes), settings.head_scale) if settings else None)
    method.begin_task(head)
    if method.trainable():
        groups = method.param_groups(settings.lr)
        if stream.head is None:
            groups = [*groups, {"params": list(head.parameters()), "lr": settings.lr}]
        optimizer = make_optimizer(settings, groups)
        shuffled = batches(samples, EPOCHS[stream.scenario] if epochs is None else epochs)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(shuffled))
        method.model.train()
        for number, (images, labels) in enumerate(shuffled):
            labels = labels if stream.head else torch.searchsorted(classes, labels)
            task_loss = functools.partial(classify, method.model, head, images, labels)
            meter(number, functools.partial(method.training_step, images, task_loss, optimizer))
            schedule.step()
    return method.end_task()


class StepMeter:
    """Times every training step but one a task, of which it takes the peak of memory."""

    def __init__(self, memory_at: int = 20) -> None:
        self.seconds: list[float] = []
        self.bytes: int | None = None
        self.memory_at = memory_at

    def __call__(self, number: int, step: Callable[[], object]) -> None:
        """Run ``step``, the training step of that number in its task."""
        if number == self.memory_at:
            _, peak = peak_memory(step)
            self.bytes = max(peak, self.bytes or 0)
            return
        start = time.perf_counter()
        step()
        self.seconds.append(time.perf_counter() - start)

    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None
