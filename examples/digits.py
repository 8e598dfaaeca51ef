"""scikit-learn's digits as a sequence of tasks for a small vision transformer.

Two scenarios. "classes": every task brings two new digits, the backbone is pretrained on the four that come first.
"domains": every task turns all ten digits another way, the backbone and its head are pretrained on upright ones.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clora_kernels.continual.extras import require

# transformers imports torchao where it is installed, which tells each process of parts that need a GPU.
for talker in ("torchao", "torch.utils._pytree"):
    logging.getLogger(talker).setLevel(logging.ERROR)

SCENARIOS = ("classes", "domains")
DIGITS, PRETRAINING_CLASSES, TASKS, CLASSES_A_TASK = 10, 4, 3, 2
HIDDEN = 64
# As many steps in either scenario, about: all ten digits are two and a half times as many images as four.
PRETRAINING_EPOCHS = {"classes": 40, "domains": 16}
PRETRAINING_BATCH, PRETRAINING_LR = 64, 1e-3
EPOCHS, BATCH = {"classes": 12, "domains": 3}, 32


class Samples(NamedTuple):
    """Images [S, 1, 8, 8] in [0, 1] and labels [S]."""

    images: Tensor
    labels: Tensor

    def of(self, classes: list[int]) -> Samples:
        chosen = torch.isin(self.labels, torch.tensor(classes))
        return Samples(self.images[chosen], self.labels[chosen])

    def turned(self, quarters: int) -> Samples:
        """The same, turned by so many quarters of a circle."""
        return Samples(self.images.rot90(quarters, (-2, -1)), self.labels)

    @staticmethod
    def of_all(tasks: list[Samples]) -> Samples:
        return Samples(*(torch.cat(part) for part in zip(*tasks, strict=True)))


@dataclass(frozen=True)
class Stream:
    """The tasks of one seed, and the backbone pretrained on what comes before them. ``head`` is its classifier, frozen,
    where all tasks have the same classes; None where each brings its own."""

    seed: int
    scenario: str
    train: list[Samples]
    test: list[Samples]
    backbone: nn.Module
    head: nn.Module | None


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


def make_stream(seed: int, scenario: str = "classes") -> Stream:
    """Data, order of the tasks and pretrained backbone of a seed: the same for every method."""
    torch.manual_seed(seed)
    train, test = load_digits(seed)
    if scenario == "classes":
        order = torch.randperm(DIGITS).tolist()
        first, rest = order[:PRETRAINING_CLASSES], order[PRETRAINING_CLASSES:]
        tasks = [rest[i * CLASSES_A_TASK : (i + 1) * CLASSES_A_TASK] for i in range(TASKS)]
        pretraining, parts = train.of(first), [[s.of(classes) for classes in tasks] for s in (train, test)]
    else:
        turns = (1 + torch.randperm(TASKS)).tolist()
        pretraining, parts = train, [[s.turned(quarters) for quarters in turns] for s in (train, test)]
    backbone, head = Backbone(), nn.Linear(HIDDEN, DIGITS)
    pretrain(backbone, head, pretraining, PRETRAINING_EPOCHS[scenario])
    kept = head.requires_grad_(False) if scenario == "domains" else None
    return Stream(seed, scenario, *parts, backbone.requires_grad_(False).eval(), kept)


def pretrain(backbone: nn.Module, head: nn.Module, samples: Samples, epochs: int) -> None:
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=PRETRAINING_LR)
    shuffled = batches(samples, epochs, PRETRAINING_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(shuffled))
    for images, labels in shuffled:
        optimizer.zero_grad()
        classify(backbone, head, images, labels).backward()
        optimizer.step()
        schedule.step()


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
