"""What must hold before a time is taken: orthogonality, and Q and the gradient of V against fp64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clora_kernels.reference.gram_schmidt import GramSchmidtResult
from clora_kernels.testing import assert_orthonormal

from .contestants import BUILDERS, OURS, Problem

# Relative Frobenius error of Q and of the gradient of V, in eps of V.dtype: allowed to ours; plainly wrong beyond.
ROUNDINGS, WRONG = 4, 1024


@dataclass(frozen=True)
class Verdict:
    """Relative Frobenius error of the gradient of V, and of Q."""

    error_gradient: float | None = None
    error_Q: float | None = None


@torch.no_grad()
def truths(problem: Problem) -> dict[str, Tensor]:
    """Q and the gradient of V in fp64, by ``torch.linalg.qr`` with a positive diagonal."""
    with torch.enable_grad():
        V = problem.V.double().requires_grad_()
        P = None if problem.P is None else problem.P.double()
        Q, R = torch.linalg.qr(V if P is None else V - P @ (P.mT @ V))
        sign = R.diagonal(dim1=-2, dim2=-1).sign().detach()[:, None, :]
        outputs, gradients = [Q * sign, R * sign.mT], [problem.dQ.double(), problem.dR.double()]
        (dV,) = torch.autograd.grad(outputs, V, gradients)
    return {"Q": outputs[0].detach(), "V": dV}


def check(name: str, problem: Problem, truth: Mapping[str, Tensor]) -> Verdict:
    """The verdict on a contestant. Ours is held to the gates of orthogonality and to a few roundings in Q and gradient;
    others must not be plainly wrong. Raises AssertionError if it must not be timed."""
    if name == "copy":
        return Verdict()
    contestant = BUILDERS[name](problem)
    Q, R = contestant.forward()
    sign = R.detach().diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    dQ, dR = contestant.gradients
    (dV,) = replace(contestant, gradients=(dQ * sign.to(dQ.dtype), dR * sign.mT)).backward((Q, R))
    if name in OURS:
        full = torch.full((problem.point.B,), problem.point.r, dtype=torch.int32)
        assert_orthonormal(GramSchmidtResult(Q.detach(), R.detach(), full), problem.V, problem.P)
    errors = {"V": dV.double() - truth["V"], "Q": Q.detach().double() * sign - truth["Q"]}
    found = {k: float(e.norm() / truth[k].norm()) for k, e in errors.items()}
    allowed = (ROUNDINGS if name in OURS else WRONG) * torch.finfo(problem.V.dtype).eps
    worst = max(found, key=lambda k: found[k] if found[k] == found[k] else float("inf"))
    if not found[worst] <= allowed:
        raise AssertionError(f"{worst} is off by {found[worst]:.2g} of its norm, allowed {allowed:.2g}")
    return Verdict(found["V"], found["Q"])
