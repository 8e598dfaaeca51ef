"""A small model, tasks and loop for the tests of continual learning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clora_kernels.continual import ContinualMethod

TARGETS = ["first", "second"]


class Net(nn.Module):
    """x [S, 6] → [S, 3]; two layers to adapt and one to leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 9), nn.Linear(9, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


def batch(task: int, number: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels, the same whenever asked for."""
    generator = torch.Generator().manual_seed(1000 * task + number)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def train(
    method: ContinualMethod, optimizer: torch.optim.Optimizer, task: int, numbers: range
) -> list[dict[str, Tensor]]:
    """Training steps on these batches; the losses of each."""
    method.model.train()
    losses = []
    for number in numbers:
        x, labels = batch(task, number)
        losses.append(
            method.training_step(x, lambda x=x, labels=labels: F.cross_entropy(method.model(x), labels), optimizer)
        )
    return losses


def learn(method: ContinualMethod, tasks: int, lr: float = 0.1) -> list:
    """Whole tasks of ten steps with the method's own groups; their reports."""
    reports = []
    for _ in range(tasks):
        method.begin_task()
        optimizer = torch.optim.SGD(method.param_groups(lr), momentum=0.9)
        train(method, optimizer, method.task, range(10))
        reports.append(method.end_task())
    return reports
