"""The methods that the tests of the protocol go through, one of them a user's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from sequences import TARGETS
from torch import Tensor, nn

from clora_kernels import RoutedLoRALinear
from clora_kernels.continual import DAC, SLAO, CLoRA, ContinualMethod, SequentialLoRA

METHODS = {
    "lora": partial(SequentialLoRA, targets=TARGETS, r=4),
    "lora of the first task": partial(SequentialLoRA, targets=TARGETS, r=4, train="first_task"),
    "c-lora": partial(CLoRA, targets=TARGETS, r=4),
    "c-lora, first factors": partial(CLoRA, targets=TARGETS, r=4, train_factors="first_task"),
    "slao": partial(SLAO, targets=TARGETS, r=4),
    "dac": partial(DAC, targets=TARGETS, r=4, k=3, keep=2),
    "dac by sample": partial(DAC, targets=TARGETS, r=4, k=3, keep=2, selection="sample", weights="probability"),
}


class KeptApart(ContinualMethod):
    """A method made up for the tests, with every hook: LoRA whose A keeps away from the A of earlier tasks, and before
    each batch's step one that pulls the first layer's B to 1."""

    def make_layer(self, linear: nn.Module) -> RoutedLoRALinear:
        return RoutedLoRALinear.from_linear(linear, r=2, routing=False)

    def on_task_start(self) -> None:
        self.calls = ["start"]

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("check")

    def extra_steps(self, inputs: Any) -> Iterator[tuple[str, Tensor]]:
        self.calls.append(f"steps on {tuple(inputs.shape)}")
        B = self.layers["first"].lora_B
        self.before = B.detach().clone()
        yield "pull", (B - 1).square().sum()
        self.moved = B.detach() - self.before

    def extra_losses(self) -> dict[str, Tensor]:
        self.calls.append("losses")
        old = {k: v for k, v in self.kept.items() if k.startswith("A.")}
        overlap = [(m.lora_A @ old[f"A.{name}"].mT).abs().sum() for name, m in self.layers.items() if old]
        return {"overlap": 0.5 * torch.stack(overlap).sum()} if overlap else {}

    def adjust_gradients(self, step: str) -> None:
        self.calls.append(f"adjust {step}")
        if step == "pull":
            assert self.layers["second"].lora_A.grad is None
            self.layers["first"].lora_B.grad[0] = 0

    def on_task_end(self) -> dict[str, float | None]:
        for name, layer in self.layers.items():
            A = layer.lora_A.detach().clone()
            self.kept[f"A.{name}"] = torch.cat([self.kept[f"A.{name}"], A]) if f"A.{name}" in self.kept else A
            layer.fold()
        return {"bases": float(self.kept["A.first"].shape[0])}
