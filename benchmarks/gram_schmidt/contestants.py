"""Who is measured: ``torch.linalg.qr``, Gram-Schmidt, CholeskyQR2 in a few lines of PyTorch, and a copy.

All of them get the same matrices V [B, d, r] and, at some points, an orthonormal basis P [B, d, k] to stay orthogonal
to, and return Q and R with gradients for both. 16-bit V goes through ``torch.linalg.qr`` and CholeskyQR2 in fp32, and Q
comes back in 16 bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clora_kernels import gram_schmidt
from clora_kernels.dispatch.routed_lora import why_not_triton

from .points import Point


@dataclass(frozen=True)
class Problem:
    """The tensors of one point."""

    point: Point
    V: Tensor
    P: Tensor | None
    dQ: Tensor
    dR: Tensor


def make_problem(point: Point, device: torch.device, seed: int = 0) -> Problem:
    """Random matrices of a point, as LoRA factors start."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    B, d, r, k = point.B, point.d, point.r, point.k
    P = torch.linalg.qr(normal(B, d, k).double()).Q.float().contiguous() if k else None
    V = (normal(B, d, r) * d**-0.5).to(point.dtype)
    return Problem(point, V, P, normal(B, d, r).to(point.dtype), normal(B, r, r).triu())


@dataclass(frozen=True)
class Contestant:
    """``run`` gives Q, R of V; what backward differentiates is V."""

    run: Callable[[Tensor], tuple[Tensor, ...]]
    V: Tensor
    gradients: tuple[Tensor, ...]

    def forward(self) -> tuple[Tensor, ...]:
        return self.run(self.V)

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, self.V, self.gradients)


def _contestant(problem: Problem, run: Callable[[Tensor], tuple[Tensor, ...]]) -> Contestant:
    return Contestant(run, problem.V.detach().clone().requires_grad_(), (problem.dQ, problem.dR))


def ours(problem: Problem) -> Contestant:
    """``gram_schmidt`` as it chooses by itself."""
    return _contestant(problem, lambda V: gram_schmidt(V, problem.P)[:2])


def ours_aten(problem: Problem) -> Contestant:
    """``gram_schmidt`` without the compiled part."""
    return _contestant(problem, lambda V: gram_schmidt(V, problem.P, backend="aten")[:2])


def ours_triton(problem: Problem) -> Contestant:
    """``gram_schmidt`` in Triton kernels, where they run."""
    return _contestant(problem, lambda V: gram_schmidt(V, problem.P, backend="triton")[:2])


def why_not(name: str, point: Point, device: torch.device) -> str | None:
    """Why a contestant cannot take part on a device; None if it can."""
    return (why_not_triton(point.dtype, device.type, device.index) or None) if name == "ours_triton" else None


def _beside(V: Tensor, P: Tensor | None) -> Tensor:
    """V in fp32, projected twice."""
    V = V.float()
    for _ in range(2 if P is not None else 0):
        V = V - P @ (P.mT @ V)
    return V


def qr(problem: Problem) -> Contestant:
    """``torch.linalg.qr``, after two projections where there is a basis."""

    def run(V: Tensor) -> tuple[Tensor, ...]:
        Q, R = torch.linalg.qr(_beside(V, problem.P))
        return Q.to(V.dtype), R

    return _contestant(problem, run)


def cholesky_qr2(problem: Problem) -> Contestant:
    """CholeskyQR2 in a few lines of PyTorch: no rank, and NaN where a matrix is not well conditioned."""

    def run(V: Tensor) -> tuple[Tensor, ...]:
        Q, R = _beside(V, problem.P), None
        for _ in range(2):
            upper = torch.linalg.cholesky_ex(Q.mT @ Q).L.mT
            Q = torch.linalg.solve_triangular(upper, Q, upper=True, left=False)
            R = upper if R is None else upper @ R
        return Q.to(V.dtype), R

    return _contestant(problem, run)


def copy(problem: Problem) -> Contestant:
    """A copy of V, and one of dQ for its gradient: the least that anybody reads and writes."""
    V = problem.V.detach().clone().requires_grad_()
    return Contestant(lambda V: (V * 1,), V, (problem.dQ,))  # clone() would hand dQ on as it is


OURS = {"ours": ours, "ours_aten": ours_aten, "ours_triton": ours_triton}
BUILDERS = {"qr": qr, **OURS, "cholesky_qr2": cholesky_qr2, "copy": copy}
