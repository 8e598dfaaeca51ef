"""What must hold before a time is taken: results against fp64, and how much of the adapter is in the output.

Routed LoRA is held to ``clora_kernels.testing``: parity of y and of every gradient, and adapter fidelity, with dropout.
Other contestants are not ours to fail: one whose results are plainly wrong is not timed, one that loses part of the
adapter to rounding is timed and shown with its alpha. Their draws cannot be replayed: they are checked without dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clora_kernels import routed_lora_linear
from clora_kernels.reference import routed_lora as reference
from clora_kernels.testing import adapter_fidelity, assert_parity

from .contestants import BUILDERS, OURS, YARDSTICK, Problem

# Relative Frobenius error beyond which a result is wrong: every chain of roundings in use stays a decade below.
WRONG = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Verdict:
    """``alpha`` is 1 within 4·``sigma`` + 2⁻⁹ where the adapter came through whole (``faithful``).
    ``error``: largest relative Frobenius error of y and gradients; None where the stricter rule of parity held."""

    alpha: float | None = None
    sigma: float | None = None
    faithful: bool | None = None
    error: float | None = None


def check(name: str, problem: Problem, truth: Mapping[str, Tensor]) -> Verdict:
    """The verdict on a contestant; ``truth`` as of :func:`truths`. Raises AssertionError if it must not be timed."""
    if name in YARDSTICK:
        return Verdict()
    return _check_ours(name, problem) if name in OURS else _check_other(name, problem, truth)


def _check_ours(name: str, problem: Problem) -> Verdict:
    inputs: dict[str, Any] = dict(problem.layer)
    gradients = ["x", "lora_A", "lora_B"]
    if problem.point.dropout_p:
        inputs |= {"dropout_p": problem.point.dropout_p, "dropout_seed": problem.seed}
    if name == "ours_clora":
        inputs |= {"routing": problem.routing, "frozen_routing": problem.frozen_routing}
        gradients.append("routing")
    layer = partial(routed_lora_linear, backend="triton" if name == "ours_triton" else "auto")
    assert_parity(layer, inputs, dy=problem.dy, gradients=gradients)
    with torch.no_grad():
        fidelity = adapter_fidelity(layer(**inputs), **inputs)
    if not fidelity.ok:
        raise AssertionError(str(fidelity))
    return Verdict(fidelity.alpha, fidelity.sigma, True)


def _check_other(name: str, problem: Problem, truth: Mapping[str, Tensor]) -> Verdict:
    contestant = BUILDERS[name](problem.without_dropout())
    y = contestant.forward()
    results = dict(zip(("x", "lora_A", "lora_B"), contestant.backward(y), strict=True)) | {"y": y.detach()}
    errors = {k: ((t.double() - truth[k]).norm() / truth[k].norm()).item() for k, t in results.items()}
    worst = max(errors, key=lambda k: errors[k] if errors[k] == errors[k] else float("inf"))
    if not errors[worst] <= WRONG[problem.point.dtype]:
        raise AssertionError(f"{worst} is off by {errors[worst]:.2g} of its norm")
    fidelity = adapter_fidelity(results["y"], **problem.layer)
    return Verdict(fidelity.alpha, fidelity.sigma, fidelity.ok, errors[worst])


@torch.no_grad()
def truths(problem: Problem) -> dict[str, Tensor]:
    """y and the gradients of x, lora_A and lora_B in fp64, without dropout."""
    inputs = {k: v.double() if isinstance(v, Tensor) else v for k, v in problem.layer.items()}
    gradients = reference.backward(problem.dy.double(), **inputs)
    return {"y": reference.forward(**inputs)} | {k: getattr(gradients, k) for k in ("x", "lora_A", "lora_B")}
