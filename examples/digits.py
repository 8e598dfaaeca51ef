"""scikit-learn's digits as a sequence of tasks for a small vision transformer, and one run of a method over them."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clora_kernels.continual import ContinualMethod, CosineHead, Prototypes, TaskAccuracies, TaskReport
from clora_kernels.continual.extras import require
from clora_kernels.testing import peak_memory

PRETRAINING_CLASSES, TASKS, CLASSES_A_TASK = 4, 3, 2
HIDDEN = 64
PRETRAINING_EPOCHS, PRETRAINING_BATCH, PRETRAINING_LR = 40, 64, 1e-3
EPOCHS, BATCH = 12, 32


class Samples(NamedTuple):
    """Images [S, 1, 8, 8] in [0, 1] and labels [S]."""

    images: Tensor
    labels: Tensor

    def of(self, classes: list[int]) -> Samples:
        chosen = torch.isin(self.labels, torch.tensor(classes))
        return Samples(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Stream:
    """The tasks of one seed: split, class order, and the backbone pretrained on the classes that come first."""

    seed: int
    train: Samples
    test: Samples
    tasks: list[list[int]]
    backbone: nn.Module


def load_digits(seed: int) -> tuple[Samples, Samples]:
    """Training and test samples, 70 to 30, each class in that proportion."""
    require("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.3, stratify=labels, random_state=seed)
    train_x, test_x, train_y, test_y = (torch.as_tensor(part) for part in split)

    def samples(x: Tensor, y: Tensor) -> Samples:
        return Samples((x.float() / 16).reshape(-1, 1, 8, 8), y.long())

    return samples(train_x, train_y), samples(test_x, test_y)


class Backbone(nn.Module):
    """A vision transformer, randomly initialised: images [S, 1, 8, 8] to the features [S, 64] of its class token."""

    def __init__(self) -> None:
        super().__init__()
        require("transformers")
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=HIDDEN,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(pixel_values=images).last_hidden_state[:, 0]


def batches(samples: Samples, epochs: int, size: int = BATCH) -> list[Samples]:
    """All batches of these epochs, shuffled anew each time; the last of an epoch may be smaller."""
    orders = [torch.randperm(len(samples.labels)).split(size) for _ in range(epochs)]
    return [Samples(samples.images[i], samples.labels[i]) for order in orders for i in order]


def make_stream(seed: int) -> Stream:
    """Data, class order and pretrained backbone of a seed: the same for every method."""
    torch.manual_seed(seed)
    train, test = load_digits(seed)
    order = torch.randperm(10).tolist()
    first, rest = order[:PRETRAINING_CLASSES], order[PRETRAINING_CLASSES:]
    tasks = [rest[i * CLASSES_A_TASK : (i + 1) * CLASSES_A_TASK] for i in range(TASKS)]
    backbone, pretraining = Backbone(), train.of(first)
    head = nn.Linear(HIDDEN, 10)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=PRETRAINING_LR)
    shuffled = batches(pretraining, PRETRAINING_EPOCHS, PRETRAINING_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(shuffled))
    for images, labels in shuffled:
        optimizer.zero_grad()
        classify(backbone, head, images, labels).backward()
        optimizer.step()
        schedule.step()
    return Stream(seed, train, test, tasks, backbone.requires_grad_(False).eval())


def classify(model: nn.Module, head: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of one batch."""
    return F.cross_entropy(head(model(images)), labels)


class Settings(NamedTuple):
    """How a method's adapters and head are optimised: "sgd" or "adamw", its rate, the scale the head starts from."""

    optimizer: str
    lr: float
    head_scale: float


def make_optimizer(settings: Settings, groups: list[dict]) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.0)


class Run(NamedTuple):
    """What one method did on one stream. The median training step in seconds and the peak of one in bytes are None for
    a method that never trains."""

    accuracies: TaskAccuracies
    reports: list[TaskReport]
    trainable: int
    step_seconds: float | None
    step_bytes: int | None


MakeMethod = Callable[[nn.Module], ContinualMethod]


def run(stream: Stream, make_method: MakeMethod, settings: Settings, joint: bool = False, repeat: int = 0) -> Run:
    """Learn the tasks of ``stream`` one after the other and test after each; ``joint``: instead of going on, start anew
    each time, with the data of all tasks so far. ``repeat``: which draw of adapters, heads and batches."""
    torch.manual_seed(stream.seed + 1000 * repeat)
    accuracy, masked = torch.full((TASKS, TASKS), torch.nan), torch.zeros(TASKS)
    meter, reports, trainable = StepMeter(), [], 0
    for i in range(TASKS):
        if i == 0 or joint:
            method, prototypes = make_method(copy.deepcopy(stream.backbone)), Prototypes()
        seen = stream.tasks[: i + 1]
        report = learn(
            method, stream.train.of([c for task in seen for c in task] if joint else seen[-1]), settings, meter
        )
        for classes in seen if joint else seen[-1:]:
            samples = stream.train.of(classes)
            prototypes.add_task(features(method, samples.images)[-1], samples.labels)
        for j, classes in enumerate(seen):
            images, labels = stream.test.of(classes)
            views = features(method, images)
            found = views[0] if len(views) == 1 else views
            accuracy[i, j] = (prototypes.predict(found) == labels).double().mean()
            if j == i:
                masked[i] = (prototypes.predict(found, task=i + 1) == labels).double().mean()
        reports.append(report)
        trainable = max(trainable, report.trainable)
    samples = torch.tensor([len(stream.test.of(classes).labels) for classes in stream.tasks])
    return Run(TaskAccuracies(accuracy, masked, samples), reports, trainable, meter.median(), meter.bytes)


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
    method: ContinualMethod, samples: Samples, settings: Settings, meter: StepMeter, epochs: int = EPOCHS
) -> TaskReport:
    """One task: a cosine head of its own, trained with the adapters on the task's classes alone."""
    method.begin_task()
    if method.trainable():
        classes = samples.labels.unique()
        head = CosineHead(HIDDEN, len(classes), settings.head_scale)
        groups = [*method.param_groups(settings.lr), {"params": list(head.parameters()), "lr": settings.lr}]
        optimizer = make_optimizer(settings, groups)
        shuffled = batches(samples, epochs)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(shuffled))
        method.model.train()
        for number, (images, labels) in enumerate(shuffled):
            task_loss = functools.partial(classify, method.model, head, images, torch.searchsorted(classes, labels))
            meter(number, functools.partial(method.training_step, images, task_loss, optimizer))
            schedule.step()
    return method.end_task()


@torch.no_grad()
def features(method: ContinualMethod, images: Tensor) -> list[Tensor]:
    """The features [S, 64] in each of the method's views."""
    found = []
    for view in method.views():
        with method.inference(view) as model:
            found.append(model(images))
    return found


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
