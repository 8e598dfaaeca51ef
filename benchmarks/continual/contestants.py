"""Who is measured: a method's training step, with the kernels and with the plain reference of every operation; and the
frozen model, forward and back to its embedding and its head, which is about the least that a step costs (a method needs
no gradient of the embedding).

All get the same model, batch and labels. A method is in its second task, so that its old routing, its teacher or what
earlier tasks left takes part in the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clora_kernels.continual import DAC, SLAO, CLLoRA, CLoRA, ContinualMethod, SequentialLoRA

from .models import CLASSES, MODELS, Head, Model, Shape
from .points import Point

METHODS: dict[str, Callable[..., ContinualMethod]] = {
    "lora": SequentialLoRA, "c-lora": CLoRA, "cl-lora": CLLoRA, "dac": DAC, "slao": SLAO,
}  # fmt: skip
_Q_V = ("attention.q_proj", "attention.v_proj")
_LEARNED = 0.05  # standard deviation of what a task adds to each parameter
# Steps that are timed leave the parameters practically where they are: every call does the same.
_RATE, _MOMENTUM = 1e-9, 0.9


def targets(method: str, shape: Shape) -> tuple[str, ...]:
    """The adapted layers of a block: those that CL-LoRA and DAC are published with; otherwise, of a ViT, the query, the
    value and the MLP, of a Llama all."""
    if method == "cl-lora":
        return _Q_V
    if method == "dac" or shape.llama:
        return tuple(shape.linears())
    return (*_Q_V, *(name for name in shape.linears() if name.startswith("mlp.")))


@dataclass(frozen=True)
class Problem:
    """The frozen ``model``; ``method``, on a model of its own, in its second task; hidden states x [S, tokens, width],
    labels [S] or [S, tokens]. Contestants copy what they change."""

    point: Point
    model: nn.Module
    head: nn.Module
    method: ContinualMethod
    x: Tensor
    labels: Tensor


def make_problem(point: Point, device: torch.device, seed: int = 0) -> Problem:
    """Random weights and hidden states of a point; noise is what the method learned in the first task, and in the
    second so far: nothing it has is zero. What the tokens of a sample share comes through an attention that is nearly
    uniform; without it student and teacher would differ by less than a rounding of bf16."""
    torch.manual_seed(seed)
    shape = MODELS[point.model]
    with device:
        model, head = Model(shape).to(point.dtype), Head(shape)
        x = torch.randn(point.batch, point.tokens, shape.width) + torch.randn(point.batch, 1, shape.width)
        labels = torch.randint(CLASSES, (point.batch, point.tokens) if shape.llama else (point.batch,))
    model.requires_grad_(False)
    method = METHODS[point.method](copy.deepcopy(model), targets(point.method, shape))
    for task in (1, 2):
        method.begin_task(head)
        for p in method.trainable():
            p.data += _LEARNED * torch.randn_like(p)
        if task == 1:
            method.end_task()
    for layer in method.layers.values():
        if isinstance(router := getattr(layer, "router", None), nn.Linear):
            # A choice is a step: near a tie, fp64 and the point's dtype would take other experts.
            router.bias.data.copy_(torch.randperm(router.out_features) * 4.0)
    return Problem(point, model, head, method, x.to(point.dtype), labels)


def loss_of(model: nn.Module, head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of the head's logits."""
    return F.cross_entropy(head(model(x)).flatten(0, -2), labels.flatten())


class Frozen:
    """The model without adapters: loss, and the gradients of x and of the head."""

    def __init__(self, problem: Problem) -> None:
        self.model, self.head, self.labels = problem.model, copy.deepcopy(problem.head), problem.labels
        self.x = problem.x.detach().clone().requires_grad_()

    def forward(self) -> Tensor:
        return loss_of(self.model, self.head, self.x, self.labels)

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.x, *self.head.parameters()))


class Training:
    """A training step in two parts: ``forward`` makes the method's own steps, then the losses; ``backward``
    differentiates these and steps. The same as ``ContinualMethod.training_step``, by the hooks it is made of.

    ``dtype``: of model, adapters and all that the method carries; None: as the problem has them.
    """

    def __init__(self, problem: Problem, backend: str = "auto", dtype: torch.dtype | None = None) -> None:
        self.method, self.head = copy.deepcopy((problem.method, problem.head))
        self.x, self.labels = problem.x, problem.labels
        for layer in self.method.layers.values():
            layer.backend = backend
        if dtype is not None:
            for module in (self.method.model, self.method.own, self.head):
                module.to(dtype)
            kept = self.method.kept.items()
            self.method.kept = {name: t.to(dtype) if t.is_floating_point() else t for name, t in kept}
            self.method.on_load()
            self.x = self.x.to(dtype)
        groups: list[dict[str, Any]] = [*self.method.param_groups(_RATE), {"params": self.head.parameters()}]
        self.optimizer = torch.optim.SGD(groups, lr=_RATE, momentum=_MOMENTUM)

    def forward(self) -> Tensor:
        for name, loss in self.method.extra_steps(self.x):
            self.step(name, loss)
        loss = loss_of(self.method.model, self.head, self.x, self.labels)
        for extra in self.method.extra_losses().values():
            loss = loss + extra
        return loss

    def backward(self, loss: Tensor) -> None:
        self.step("task", loss)
        self.optimizer.zero_grad(set_to_none=True)  # what a call leaves, another's peak memory would lack

    def step(self, name: str, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.method.adjust_gradients(name)
        self.optimizer.step()


def ours(problem: Problem) -> Training:
    """The method with the kernels that are chosen by themselves."""
    return Training(problem)


def ours_reference(problem: Problem) -> Training:
    """The method with the plain reference of every operation."""
    return Training(problem, "reference")


def why_not(name: str, point: Point, device: torch.device) -> str | None:
    """Why a contestant cannot take part on a device; None if it can."""
    if name == "ours_reference" and point.method == "dac" and device.type == "cpu" and point.batch * point.tokens > 256:
        return "its dropout, drawn by plain torch, would take many times what all else takes"
    return None


OURS = {"ours": ours}
BUILDERS: dict[str, Callable[[Problem], Any]] = {"frozen": Frozen, **OURS, "ours_reference": ours_reference}
