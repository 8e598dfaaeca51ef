"""Who is measured: the form in use, which copies the chosen rows, eager and compiled; the whole pool with a mask; ours.

All of them get the same x, pool, indices and gates, in one dtype, and give the gradients of all but the indices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clora_kernels import rank1_experts
from clora_kernels.kernels.rank1_experts import native

from .points import Point


@dataclass(frozen=True)
class Problem:
    """The tensors of one point: x and dy [M, d], or [S, L, d] with indices and gates of samples."""

    point: Point
    x: Tensor
    experts_A: Tensor
    experts_B: Tensor
    indices: Tensor
    gates: Tensor
    dy: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.experts_A, self.experts_B, self.gates


NAMES = ("x", "experts_A", "experts_B", "gates")


def make_problem(point: Point, device: torch.device, seed: int = 0) -> Problem:
    """Random tensors of a point; a row's experts are drawn one by one, so some come twice."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * scale).to(point.dtype)

    M, d, E, k, L = point.M, point.d, point.E, point.k, point.L
    rows = (M,) if L == 1 else (M // L, L)
    indices = torch.randint(E, (rows[0], k), device=device, generator=generator)
    gates = torch.rand(rows[0], k, device=device, generator=generator).softmax(-1).to(point.dtype)
    pool = normal(E, d, scale=d**-0.5), normal(E, d)
    return Problem(point, normal(*rows, d), *pool, indices, gates, normal(*rows, d))


@dataclass(frozen=True)
class Contestant:
    """``run`` of x, experts_A, experts_B and gates, which are what backward differentiates."""

    run: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    dy: Tensor

    def forward(self) -> Tensor:
        return self.run(*self.leaves)

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.leaves, self.dy)


def _contestant(problem: Problem, run: Callable[..., Tensor]) -> Contestant:
    return Contestant(run, tuple(t.detach().clone().requires_grad_() for t in problem.leaves), problem.dy)


def _gathered(problem: Problem) -> Callable[..., Tensor]:
    """As PEER's public code has it, and for samples as two batched matmuls."""
    rows, k, per_token = problem.indices.flatten(), problem.point.k, problem.x.dim() == 2

    def chosen(pool: Tensor) -> Tensor:
        return pool.index_select(0, rows).unflatten(0, (-1, k))

    def run(x: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
        if per_token:
            return torch.einsum("mk,mkn->mn", torch.einsum("md,mkd->mk", x, chosen(A)) * gates, chosen(B))
        return torch.bmm(torch.bmm(x, chosen(A).mT) * gates[:, None, :], chosen(B))

    return run


def gather(problem: Problem) -> Contestant:
    """The yardstick: index_select of both sides, then einsum or bmm."""
    return _contestant(problem, _gathered(problem))


def gather_compiled(problem: Problem) -> Contestant:
    """The same under torch.compile."""
    return _contestant(problem, torch.compile(_gathered(problem)))


def dense(problem: Problem) -> Contestant:
    """The whole pool, gated by a matrix that is zero where an expert is not chosen."""
    indices, point, per_token = problem.indices, problem.point, problem.x.dim() == 2

    def run(x: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
        mask = gates.new_zeros(indices.shape[0], point.E).scatter_add(1, indices, gates)
        return (x @ A.mT * (mask if per_token else mask[:, None, :])) @ B

    return _contestant(problem, run)


def ours(problem: Problem, backend: str = "auto") -> Contestant:
    """``rank1_experts`` as it chooses by itself."""
    return _contestant(problem, lambda x, A, B, gates: rank1_experts(x, A, B, problem.indices, gates, backend=backend))


def ours_native(problem: Problem) -> Contestant:
    """``rank1_experts`` by the compiled operators, whatever the sizes."""
    return ours(problem, "native")


def ours_aten(problem: Problem) -> Contestant:
    """``rank1_experts`` without the compiled part."""
    return ours(problem, "aten")


class _Outputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
        ctx.like = (x, A, B, gates)  # type: ignore[attr-defined]
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(t) for t in ctx.like)  # type: ignore[attr-defined]


def outputs(problem: Problem) -> Contestant:
    """Zeros for y and for every gradient: the least that anybody writes."""
    return _contestant(problem, _Outputs.apply)


OURS = {"ours": ours, "ours_native": ours_native, "ours_aten": ours_aten}
BUILDERS = {
    "gather": gather, **OURS, "dense": dense, "gather_compiled": gather_compiled, "outputs": outputs,
}  # fmt: skip

_MOST_BYTES = {"cpu": 6 << 30, "cuda": 48 << 30}  # of what a contestant may put beside the problem


def why_not(name: str, point: Point, device: torch.device) -> str | None:
    """Why a contestant cannot take part on a device; None if it can."""
    if name == "ours_native" and not native.is_compiled(device.type):
        return f"nothing is compiled for {device.type}"
    bytes_beside = {"dense": 3 * point.M * point.E * point.dtype.itemsize}.get(name, 0)
    if bytes_beside > _MOST_BYTES.get(device.type, 0):
        return f"it would need {bytes_beside / 2**30:.0f} GiB"
    return None
