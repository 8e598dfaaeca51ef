"""What must hold before a time is taken: every loss and the gradient of every trained parameter, in each of the steps
that a batch makes, against the same model and method in fp64.

A method is held to twice the error of its own step with the plain reference in the same dtype, and a spacing of the
dtype; results of a few numbers, whose errors may cancel by chance, to the largest error in their step. Single numbers
of the same name are one result: of one that is nearly zero beside the others nothing but rounding may be left. Dropout
stays on: each layer draws its seed in the order of the calls, so that from one seed of torch all draw the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .contestants import BUILDERS, Problem, Training

FEW = 64


@dataclass(frozen=True)
class Verdict:
    """The largest relative Frobenius error of losses and gradients, and whose it is; how many values are trained."""

    error: float | None = None
    error_of: str | None = None
    trained: int | None = None


def truths(problem: Problem) -> dict[str, Tensor]:
    """Losses and gradients in fp64, and the relative error of each by the plain reference in the problem's dtype."""
    truth = _results(Training(problem, "reference", torch.float64))
    results = _results(Training(problem, "reference"))
    return truth | {f"error_{name}": t for name, t in _errors(results, truth).items()}


def _results(training: Training) -> dict[str, Tensor]:
    """Losses as "step/loss" and gradients as "step/parameter", the parameters' names being those of model and head; the
    gradients of single numbers, as layers' scalings are, together as "step/name"."""
    learning = {p: name for name, p in training.method.model.named_parameters() if p.requires_grad}
    learning |= {p: f"own.{name}" for name, p in training.method.own.items()}
    learning |= {p: f"head.{name}" for name, p in training.head.named_parameters()}
    found: dict[str, Tensor] = {}
    step = training.step

    def recorded(name: str, loss: Tensor) -> None:
        step(name, loss)
        found[f"{name}/loss"] = loss.detach()
        numbers: dict[str, list[Tensor]] = {}
        for p, at in learning.items():
            if p.grad is not None and p.dim() == 0:
                numbers.setdefault(f"{name}/{at.rpartition('.')[2]}", []).append(p.grad.clone())
            elif p.grad is not None:
                found[f"{name}/{at}"] = p.grad.clone()
        found.update({at: torch.stack(gradients) for at, gradients in numbers.items()})

    training.step = recorded
    torch.manual_seed(0)
    training.backward(training.forward())
    return found


def _errors(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The relative error of each; AssertionError where one is missing, or too many."""
    expected = [name for name in truth if not name.startswith("error_")]
    if strange := set(results) ^ set(expected):
        raise AssertionError(f"losses and gradients differ from those of the truth in {', '.join(sorted(strange))}")
    return {k: (results[k].double() - truth[k]).norm() / truth[k].norm() for k in expected}


def _step(name: str) -> str:
    return name.partition("/")[0]


def check(name: str, problem: Problem, truth: Mapping[str, Tensor]) -> Verdict:
    """The verdict on a contestant; ``truth`` as of :func:`truths`. Raises AssertionError if it must not be timed."""
    if name == "frozen":
        return Verdict()
    errors = {k: float(e) for k, e in _errors(_results(BUILDERS[name](problem)), truth).items()}
    of_reference = {k: float(truth[f"error_{k}"]) for k in errors}
    spacing, most = torch.finfo(problem.point.dtype).eps, dict[str, float]()
    for k, error in of_reference.items():
        most[_step(k)] = max(error, most.get(_step(k), 0.0))
    for k, error in errors.items():
        allowed = 2 * (most[_step(k)] if truth[k].numel() < FEW else of_reference[k]) + spacing
        if not error <= allowed:
            raise AssertionError(f"{k} is off by {error:.2g} of its norm, allowed {allowed:.2g}")
    worst = max(errors, key=errors.__getitem__)
    return Verdict(errors[worst], worst, sum(p.numel() for p in problem.method.trainable()))
