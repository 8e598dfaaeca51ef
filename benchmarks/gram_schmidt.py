"""Gram-Schmidt as an operation that is measured: its named points, who takes part, what must hold, and its floors.

All contestants get the same matrices V [B, d, r] and, at some points, an orthonormal basis P [B, d, k] to stay orthogonal
to, and return Q and R with gradients for both. 16-bit V goes through torch.linalg.qr and CholeskyQR2 in fp32, and Q comes
back in 16 bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import environment  # noqa: F401
import torch
from operation import Operation
from roofline import Floor, Step
from torch import Tensor

from clora_kernels import gram_schmidt
from clora_kernels.reference.gram_schmidt import GramSchmidtResult
from clora_kernels.testing import assert_orthonormal

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Point:
    """B matrices [d, r], beside bases of k columns if k; ``quick`` marks the few that stand for the others."""

    name: str
    B: int
    d: int
    r: int
    dtype: torch.dtype
    k: int = 0
    quick: bool = False

    def __str__(self) -> str:
        basis = f" k {self.k}" if self.k else ""
        return f"{self.name}  B {self.B} d {self.d} r {self.r}{basis} {str(self.dtype).removeprefix('torch.')}"


# vit: width of ViT-B; l3: widths of Llama 3, whose ffn is rounded up; all: the factors of every layer.
GPU_POINTS = (
    Point("l3-8b-r16-all", 224, 4096, 16, FP32, quick=True),
    Point("l3-8b-r16-all-bf16", 224, 4096, 16, BF16, quick=True),
    Point("l3-8b-r64-b64", 64, 4096, 64, FP32, quick=True),
    Point("l3-8b-r256-b32", 32, 4096, 256, FP32, quick=True),
    Point("vit-r4-b512", 512, 768, 4, FP32, quick=True),
    Point("vit-r8-b48", 48, 768, 8, FP32),
    Point("vit-r16-b48", 48, 768, 16, FP32),
    Point("vit-r64-b48", 48, 768, 64, FP32),
    Point("vit-r256-b48", 48, 768, 256, FP32),
    Point("l3-8b-r8-all", 224, 4096, 8, FP32),
    Point("l3-8b-r32-all", 224, 4096, 32, FP32),
    Point("l3-8b-r64-all-bf16", 224, 4096, 64, BF16),
    Point("l3-8b-r128-b32", 32, 4096, 128, FP32),
    Point("l3-8b-r256-b32-bf16", 32, 4096, 256, BF16),
    Point("l3-8b-r16-b1", 1, 4096, 16, FP32),
    Point("l3-8b-r64-b1", 1, 4096, 64, FP32),
    Point("l3-8b-r256-b1", 1, 4096, 256, FP32),
    Point("l3-8b-ffn-r16-b64", 64, 14336, 16, FP32),
    Point("l3-70b-ffn-r64-b32", 32, 16384, 64, FP32),
    Point("l3-70b-ffn-r256-b8", 8, 16384, 256, FP32),
    Point("l3-8b-r16-k48-all", 224, 4096, 16, FP32, k=48, quick=True),
    Point("l3-8b-r16-k160-b64", 64, 4096, 16, FP32, k=160),
)

CPU_POINTS = (
    Point("vit-r16-b48", 48, 768, 16, FP32, quick=True),
    Point("vit-r16-b48-bf16", 48, 768, 16, BF16, quick=True),
    Point("l3-8b-r16-b32", 32, 4096, 16, FP32, quick=True),
    Point("l3-8b-r64-b8", 8, 4096, 64, FP32, quick=True),
    Point("l3-8b-r256-b1", 1, 4096, 256, FP32, quick=True),
    Point("vit-r4-b512", 512, 768, 4, FP32),
    Point("vit-r4-b48", 48, 768, 4, FP32),
    Point("vit-r8-b48", 48, 768, 8, FP32),
    Point("vit-r8-b48-bf16", 48, 768, 8, BF16),
    Point("vit-r32-b24", 24, 768, 32, FP32),
    Point("vit-r64-b24-bf16", 24, 768, 64, BF16),
    Point("vit-r256-b4", 4, 768, 256, FP32),
    Point("l3-1b-r8-b64", 64, 2048, 8, FP32),
    Point("l3-1b-r16-b64-bf16", 64, 2048, 16, BF16),
    Point("l3-1b-r64-b16", 16, 2048, 64, FP32),
    Point("l3-8b-r8-b32", 32, 4096, 8, FP32),
    Point("l3-8b-r16-b32-bf16", 32, 4096, 16, BF16),
    Point("l3-8b-r16-all-bf16", 224, 4096, 16, BF16),
    Point("l3-8b-r32-b1", 1, 4096, 32, FP32),
    Point("l3-8b-r32-b16", 16, 4096, 32, FP32),
    Point("l3-8b-r64-b8-bf16", 8, 4096, 64, BF16),
    Point("l3-8b-r128-b4", 4, 4096, 128, FP32),
    Point("l3-8b-r256-b1-bf16", 1, 4096, 256, BF16),
    Point("l3-70b-ffn-r16-b8", 8, 16384, 16, FP32),
    Point("l3-70b-ffn-r64-b2", 2, 16384, 64, FP32),
    Point("l3-70b-ffn-r256-b1", 1, 16384, 256, FP32),
    Point("vit-r16-k48-b48", 48, 768, 16, FP32, k=48),
    Point("l3-8b-r16-k48-b16", 16, 4096, 16, FP32, k=48),
)


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
    return Problem(point, V, P, normal(B, d, r).to(point.dtype), normal(B, r, r))


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
    """CholeskyQR2 as it is written in a few lines of PyTorch; no rank, and NaN where a matrix is not well conditioned."""

    def run(V: Tensor) -> tuple[Tensor, ...]:
        Q, R = _beside(V, problem.P), None
        for _ in range(2):
            upper = torch.linalg.cholesky_ex(Q.mT @ Q).L.mT
            Q = torch.linalg.solve_triangular(upper, Q, upper=True, left=False)
            R = upper if R is None else upper @ R
        return Q.to(V.dtype), R

    return _contestant(problem, run)


def copy(problem: Problem) -> Contestant:
    """A copy of V, and of its gradient: less than one pass of anybody."""
    V = problem.V.detach().clone().requires_grad_()
    return Contestant(lambda V: (V.clone(),), V, (problem.dQ,))


BUILDERS = {"qr": qr, "ours": ours, "ours_aten": ours_aten, "cholesky_qr2": cholesky_qr2, "copy": copy}
OURS = ("ours", "ours_aten")


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
    """The verdict on a contestant. Ours is held to the gates of orthogonality and, in its gradient, to a few roundings;
    others must not be plainly wrong. Raises AssertionError if it must not be timed."""
    if name == "copy":
        return Verdict()
    contestant = BUILDERS[name](problem)
    Q, R = contestant.forward()
    sign = R.detach().diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    contestant = Contestant(contestant.run, contestant.V, (problem.dQ * sign.to(Q.dtype), problem.dR * sign.mT))
    (dV,) = contestant.backward((Q, R))
    if name in OURS:
        full = torch.full((problem.point.B,), problem.point.r, dtype=torch.int32)
        assert_orthonormal(GramSchmidtResult(Q.detach(), R.detach(), full), problem.V, problem.P)
    errors = {"V": dV.double() - truth["V"], "Q": Q.detach().double() * sign - truth["Q"]}
    found = {k: float(e.norm() / truth[k].norm()) for k, e in errors.items()}
    allowed = (4 if name in OURS else 1024) * torch.finfo(problem.V.dtype).eps
    if not max(found.values()) <= allowed:
        raise AssertionError(f"off by {found} of the norm, allowed {allowed:.2g}")
    return Verdict(found["V"], found["Q"])


def floor(point: Point, name: str) -> Floor:
    """Two passes: V is read for its Gram matrix and read again while Q is written; backward likewise of Q and dQ."""
    B, d, r, k, e = point.B, point.d, point.r, point.k, point.dtype.itemsize
    tall, basis = B * d * r * e, 4 * B * d * k
    if name == "copy":
        return Floor((Step("copy", 0, 2 * tall),), (Step("copy", 0, 2 * tall),))
    flops = B * d * r * (r + 2 * k)
    return Floor(
        forward=(Step("gram", flops, tall + basis), Step("apply", flops, 2 * tall + basis)),
        backward=(
            Step("inner", B * d * r * (r + 2 * k), 2 * tall + basis),
            Step("combine", B * d * r * (3 * r + 2 * k), 3 * tall + basis),
        ),
    )


def why_not(name: str, point: Point, device: torch.device) -> str | None:
    """Everybody can take part everywhere."""
    return None


OPERATION = Operation(
    name="gram_schmidt",
    yardstick="qr",
    ours=OURS,
    cpu_points=CPU_POINTS,
    gpu_points=GPU_POINTS,
    builders=BUILDERS,
    make_problem=make_problem,
    truths=truths,
    check=check,
    why_not=why_not,
    floor=floor,
    slow=(),
)
