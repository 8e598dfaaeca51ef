"""A small vision transformer in plain torch, its tasks, and CL-LoRA on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clora_kernels.continual import CLLoRA, CosineHead

WIDTH, CLASSES = 8, 3
TARGETS = ["q", "v"]


class Block(nn.Module):
    """Attention of two heads and an MLP; ``wrapped``: its output is the first of a tuple."""

    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Any:
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = self.o((((q @ k.mT) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
        # As careful models do where nobody needs it: what the block before put out is overwritten.
        x = x + attended if torch.is_grad_enabled() else x.add_(attended)
        x = x + self.down(torch.tanh(self.up(self.norm2(x))))
        return (x, None) if self.wrapped else x


class TinyViT(nn.Module):
    """x [S, 3, 5] → [S, 8], the class token's features."""

    def __init__(self, depth: int = 4, wrapped: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.cls = nn.Linear(5, WIDTH), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(wrapped) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            nn.init.normal_(norm.weight, 1, 0.1)
            nn.init.normal_(norm.bias, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(torch.cat([self.cls.expand(len(x), -1, -1), self.embed(x)], 1))
        for block in self.blocks:
            hidden = block(hidden)[0] if block.wrapped else block(hidden)
        return self.norm(hidden)[:, 0]


def batch(task: int, number: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs and labels, the same whenever asked for."""
    generator = torch.Generator().manual_seed(1000 * task + number)
    x = torch.randn(6, 3, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(CLASSES, (6,), generator=generator)


class Learner:
    """A method in training with a head, an optimizer and a schedule, all new in each task."""

    def __init__(self, method: CLLoRA, lr: float = 0.3) -> None:
        self.method, self.lr = method, lr
        self.dtype = method.model.embed.weight.dtype

    def begin(self) -> None:
        self.prepare()
        self.method.begin_task(self.head)
        self.make_optimizer()

    def prepare(self) -> None:
        self.head = CosineHead(WIDTH, CLASSES).to(self.dtype)

    def make_optimizer(self) -> None:
        groups = [*self.method.param_groups(self.lr), {"params": list(self.head.parameters())}]
        self.optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)

    def step(self, number: int) -> dict[str, Tensor]:
        x, labels = batch(self.method.task, number, self.dtype)
        return self.method.training_step(
            x, lambda: F.cross_entropy(self.head(self.method.model(x)), labels), self.optimizer
        )

    def train(self, numbers: range) -> None:
        for number in numbers:
            self.step(number)
            self.schedule.step()

    def learn(self, tasks: int, steps: int = 4) -> list:
        reports = []
        for _ in range(tasks):
            self.begin()
            self.train(range(steps))
            reports.append(self.method.end_task())
        return reports

    def objects(self) -> dict[str, Any]:
        return {"head": self.head, "optimizer": self.optimizer, "schedule": self.schedule}


def cl_lora(model: nn.Module | None = None, **options: Any) -> CLLoRA:
    return CLLoRA(TinyViT() if model is None else model, TARGETS, r=2, **options)
