"""What must hold before a time is taken: y and every gradient against fp64.

Ours is held to twice the error of the eager gather form in the same dtype, and a spacing of the dtype; of a few rows,
whose errors are few too and may cancel by chance, to the rule of ``clora_kernels.testing``. Others must not be plainly
wrong. The truth is made of blocks of rows, for it copies the chosen ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clora_kernels.reference import rank1_experts as reference
from clora_kernels.testing import assert_parity

from .contestants import BUILDERS, NAMES, OURS, Problem

WRONG = 64  # eps of the dtype, in the Frobenius norm, beyond which a result of anybody is plainly wrong
FEW_ROWS = 64
_BLOCK_BYTES = 1 << 30


@dataclass(frozen=True)
class Verdict:
    """The largest relative Frobenius error of y and the gradients, and whose it is."""

    error: float | None = None
    error_of: str | None = None


def _blocks(problem: Problem) -> Iterator[slice]:
    groups, point = problem.indices.shape[0], problem.point
    size = max(_BLOCK_BYTES // (8 * point.k * point.d * point.L), 1)
    for start in range(0, groups, size):
        yield slice(start, start + size)


@torch.no_grad()
def truths(problem: Problem) -> dict[str, Tensor]:
    """y and the gradients in fp64, and the relative error of each by the eager gather form in the problem's dtype."""
    A, B = problem.experts_A.double(), problem.experts_B.double()
    parts: dict[str, list[Tensor]] = {"y": [], "x": [], "gates": []}
    sums = {"experts_A": torch.zeros_like(A), "experts_B": torch.zeros_like(B)}
    for b in _blocks(problem):
        arguments = (problem.x[b].double(), A, B, problem.indices[b], problem.gates[b].double())
        parts["y"].append(reference.forward(*arguments))
        gradients = reference.backward(problem.dy[b].double(), *arguments)
        for name in ("x", "gates"):
            parts[name].append(getattr(gradients, name))
        for name, total in sums.items():
            total += getattr(gradients, name)
    truth = {name: torch.cat(blocks) for name, blocks in parts.items()} | sums
    results = _results("gather", problem)
    return truth | {f"error_{name}": _error(results[name], truth[name]) for name in ("y", *NAMES)}


def _results(name: str, problem: Problem) -> dict[str, Tensor]:
    with torch.enable_grad():
        contestant = BUILDERS[name](problem)
        y = contestant.forward()
        return {"y": y.detach()} | dict(zip(NAMES, contestant.backward(y), strict=True))


def _error(actual: Tensor, truth: Tensor) -> Tensor:
    return (actual.double() - truth).norm() / truth.norm()


def check(name: str, problem: Problem, truth: Mapping[str, Tensor]) -> Verdict:
    """The verdict on a contestant; ``truth`` as of :func:`truths`. Raises AssertionError if it must not be timed."""
    if name == "outputs":
        return Verdict()
    eps, results = torch.finfo(problem.point.dtype).eps, _results(name, problem)
    errors = {k: float(_error(t, truth[k])) for k, t in results.items()}
    if name in OURS and problem.point.M < FEW_ROWS:
        inputs = dict(zip(NAMES, problem.leaves, strict=True)) | {"indices": problem.indices}
        assert_parity(results, inputs, dy=problem.dy, gradients=NAMES, reference=reference)
    else:
        for k, error in errors.items():
            allowed = 2 * float(truth[f"error_{k}"]) + eps if name in OURS else WRONG * eps
            if not error <= allowed:
                raise AssertionError(f"{k} is off by {error:.2g} of its norm, allowed {allowed:.2g}")
    worst = max(errors, key=errors.__getitem__)
    return Verdict(errors[worst], worst)
