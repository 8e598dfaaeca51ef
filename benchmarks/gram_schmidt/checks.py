"""What must hold before a time is taken: orthogonality, and Q and the gradient of V against fp64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clora_kernels.reference.gram_schmidt import GramSchmidtResult
from clora_kernels.testing import assert_orthonormal

from .contestants import BUILDERS, OURS, Problem

WRONG = 1024  # eps of V.dtype, in the Frobenius norm, beyond which a result of anybody is plainly wrong


@dataclass(frozen=True)
class Verdict:
    """Relative Frobenius error of Q, and of the gradient of V."""

    error_Q: float | None = None
    error_gradient: float | None = None


@torch.no_grad()
def truths(problem: Problem) -> dict[str, Tensor]:
    """Q and the gradient of V in fp64, by ``torch.linalg.qr`` with a positive diagonal; and the relative error of each
    by ``torch.linalg.qr`` in the dtype of the problem."""
    with torch.enable_grad():
        V = problem.V.double().requires_grad_()
        P = None if problem.P is None else problem.P.double()
        Q, R = torch.linalg.qr(V if P is None else V - P @ (P.mT @ V))
        sign = R.diagonal(dim1=-2, dim2=-1).sign().detach()[:, None, :]
        outputs, gradients = [Q * sign, R * sign.mT], [problem.dQ.double(), problem.dR.double()]
        (dV,) = torch.autograd.grad(outputs, V, gradients)
    truth = {"Q": outputs[0].detach(), "V": dV}
    with torch.enable_grad():
        Q, R, dV = _results("qr", problem)
    return truth | {f"error_{k}": _error(t, truth[k]) for k, t in (("Q", Q), ("V", dV))}


def _results(name: str, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Q, R and the gradient of V; of others with signs such that the diagonal of R is positive, as ours is."""
    contestant = BUILDERS[name](problem)
    Q, R = contestant.forward()
    sign = R.detach().diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    if name in OURS:
        sign = torch.ones_like(sign)
    dQ, dR = contestant.gradients
    (dV,) = replace(contestant, gradients=(dQ * sign.to(dQ.dtype), dR * sign.mT)).backward((Q, R))
    return Q.detach() * sign.to(Q.dtype), R.detach() * sign.mT, dV


def _error(actual: Tensor, truth: Tensor) -> Tensor:
    return (actual.double() - truth).norm() / truth.norm()


def check(name: str, problem: Problem, truth: Mapping[str, Tensor]) -> Verdict:
    """The verdict on a contestant; ``truth`` as of :func:`truths`. Ours is held to the gates of orthogonality, and to
    twice the error of ``torch.linalg.qr`` in Q and the gradient of V; others must not be plainly wrong. Raises
    AssertionError if it must not be timed."""
    if name == "copy":
        return Verdict()
    Q, R, dV = _results(name, problem)
    if name in OURS:
        full = torch.full((problem.point.B,), problem.point.r, dtype=torch.int32)
        assert_orthonormal(GramSchmidtResult(Q, R, full), problem.V, problem.P)
    found = {k: float(_error(t, truth[k])) for k, t in (("Q", Q), ("V", dV))}
    for k, error in found.items():
        allowed = 2 * float(truth[f"error_{k}"]) if name in OURS else WRONG * torch.finfo(problem.V.dtype).eps
        if not error <= allowed:
            raise AssertionError(f"{k} is off by {error:.2g} of its norm, allowed {allowed:.2g}")
    return Verdict(found["Q"], found["V"])
