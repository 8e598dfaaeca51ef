"""Gram-Schmidt: the dispatch rule and the operators ``torch.ops.clora_kernels.gram_schmidt`` and
``gram_schmidt_backward``.

One operator serves one call and a list of matrices of different shapes. Bases travel as the list of those that are
there and ``given``, which says for each V whether it has one: dispatcher schemas have no differentiable lists of
optional tensors. Results come as all Q, then all R, then all ranks; gradients as those of V, then those of the bases
that are there, an empty tensor for one that is not wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from .. import extension
from ..kernels.gram_schmidt import aten, layer, stacks
from ..kernels.gram_schmidt.algebra import Columns, Outputs, Primitives, complete
from ..kernels.gram_schmidt.stacks import columns_of, flat
from ..library import define_operator, refuse_forward_mode_below_autograd, without_autocast
from ..reference.gram_schmidt import GramSchmidtResult, tolerance
from ..reference.routed_lora import accumulation_dtype
from .choice import Choice, check_backend, unavailable
from .routed_lora import why_not_triton

DEFICIENT = ("zero", "random", "raise")


def choose(V: Tensor, backend: str = "auto") -> Choice:
    """The rule: what is named runs or raises; ``auto`` is ``native`` on a CPU where it is built and takes the dtype,
    ``triton`` on a GPU where its kernels run and take the dtype, else ``aten``."""
    check_backend(backend)
    missing = ""
    if backend in ("auto", "native"):
        why_not = layer.why_not(V)
        if backend == "native" and why_not:
            raise unavailable("gram_schmidt", backend, f"{why_not}; use 'auto' or 'aten'")
        if not why_not:
            return _choice("native", backend)
        missing = why_not if why_not == extension.CPU_MISSING else ""
    chosen, why_not = backend, missing
    if backend == "triton" or (backend == "auto" and V.is_cuda):
        why_not = why_not_triton(V.dtype, V.device.type, V.device.index)
    if backend == "triton" and why_not:
        raise unavailable("gram_schmidt", backend, f"{why_not}; use 'auto' or 'aten'")
    if backend == "auto":
        chosen = "triton" if V.is_cuda and not why_not else "aten"
    return _choice(chosen, backend, why_not)


def decide(V: Tensor, backend: str) -> str:
    """The backend of :func:`choose` for a call that runs now, which warns once where the compiled part is missed."""
    choice = choose(V, backend)
    if choice.reason == extension.CPU_MISSING:
        extension.warn_once("gram_schmidt", V.device.type)
    return choice.backend


@cache
def _choice(chosen: str, backend: str, why_not: str = "") -> Choice:
    named = "named by the caller"
    if chosen == "reference":
        return Choice(chosen, "plain PyTorch, column by column", f"{named}; differentiable twice, slower, more memory")
    if chosen == "native":
        strategy = "Cholesky-QR in the caches, once or twice, and column by column in fp64 where it must be"
        return Choice(chosen, strategy, named if backend == chosen else "compiled operators, faster on a CPU")
    strategy = "Cholesky-QR with fp64 Gram matrices, once or twice, and column by column where it must be"
    if chosen == "triton":
        strategy = "Cholesky-QR, fp32 products in fp64 sums, once or twice, and column by column where it must be"
        return Choice(chosen, strategy, named if backend == chosen else "the kernels run here and take the dtype")
    return Choice(chosen, strategy, named if backend == chosen else why_not or "ATen runs on every device")


def _primitives(backend: str) -> Primitives:
    """The module of a backend that was chosen; Triton is imported where it runs."""
    if backend == "triton":
        from ..kernels.gram_schmidt import triton

        return triton
    return aten


def unpack_bases(against: Sequence[Tensor], given: Sequence[bool]) -> list[Tensor | None]:
    """For each V its basis, or None."""
    remaining = iter(against)
    return [next(remaining) if there else None for there in given]


def run_forward(
    Vs: Sequence[Tensor], bases: Sequence[Tensor | None], rank_tol: float | None, deficient: str, backend: str
) -> list[Tensor]:
    """All Q, all R, all ranks, in the leading dimensions of each V."""
    columns = list(map(columns_of, Vs, bases))
    if deficient == "random":  # what completes Q must be orthogonal to it before it is rounded
        columns = [c._replace(V=c.V.to(accumulation_dtype(c.V.dtype))) for c in columns]
    tol = tolerance(rank_tol, Vs[0].dtype)
    run = layer.forward if backend == "native" else partial(_forward_of_stacks, _primitives(backend))
    found = run(columns, tol)
    if deficient == "random":
        found = [
            f._replace(Q=complete(lambda c: run([c], tolerance(None, Vs[0].dtype))[0], c, f).to(V.dtype))
            for f, c, V in zip(found, columns, Vs, strict=True)
        ]
    results = list(map(_shaped, found, Vs))
    if deficient == "raise":
        check_rank(results)
    return [t for of_all in zip(*results, strict=True) for t in of_all]


def _forward_of_stacks(kernels: Primitives, columns: Sequence[Columns], rank_tol: float) -> list[GramSchmidtResult]:
    with without_autocast(columns[0].V):
        return stacks.forward(kernels, columns, rank_tol)


def _shaped(result: GramSchmidtResult, V: Tensor) -> GramSchmidtResult:
    Q = _laid_out(result.Q, V)
    if V.dim() == 3:
        return result if Q is result.Q else result._replace(Q=Q)
    lead, r = V.shape[:-2], V.shape[-1]
    return GramSchmidtResult(Q, result.R.reshape(*lead, r, r), result.rank.reshape(lead))


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with the shape and the strides of ``torch.empty_like(like)``, as the fakes promise."""
    t = t if like.dim() == 3 else t.reshape(like.shape)
    if t.is_contiguous() and like.is_contiguous():
        return t
    out = torch.empty_like(like, device="meta")
    return t if t.stride() == out.stride() else torch.empty_like(like).copy_(t)


def check_rank(results: Sequence[GramSchmidtResult]) -> None:
    for i, (_, R, rank) in enumerate(results):
        r = R.shape[-1]
        short = (rank != r).nonzero()
        if len(short):
            name = "V" if len(results) == 1 else f"matrices[{i}]"
            place = tuple(short[0].tolist())
            got = int(rank[place])
            held = "NaN or Inf" if got < 0 else f"{got} independent columns"
            where = f" at {place}" if place else ""
            raise torch.linalg.LinAlgError(f"{name}: got a matrix{where} with {held}, expected {r} independent columns")


def run_backward(
    dQs: Sequence[Tensor],
    dRs: Sequence[Tensor],
    Vs: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    Qs: Sequence[Tensor],
    Rs: Sequence[Tensor],
    need_V: Sequence[bool],
    need_P: Sequence[bool],
    backend: str,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradient of each V and of each basis; None for what is not wanted."""
    columns = list(map(columns_of, Vs, bases))
    outputs = [Outputs(*map(flat, of_one)) for of_one in zip(Qs, Rs, dQs, dRs, strict=True)]
    run = layer.backward if backend == "native" else partial(_backward_of_stacks, _primitives(backend))
    found = run(outputs, columns, any(need_V), any(need_P))
    dVs = [_laid_out(dV, V) if need else None for (dV, _), V, need in zip(found, Vs, need_V, strict=True)]
    dPs = [
        _of_basis(dP, V, P, R) if need else None
        for (_, dP), V, P, R, need in zip(found, Vs, bases, Rs, need_P, strict=True)
    ]
    return dVs, dPs


def _backward_of_stacks(
    kernels: Primitives, outputs: Sequence[Outputs], columns: Sequence[Columns], need_V: bool, need_P: bool
) -> list[tuple[Tensor | None, Tensor | None]]:
    with without_autocast(columns[0].V):
        return stacks.backward(kernels, outputs, columns, need_V, need_P)


def _of_basis(dP: Tensor | None, V: Tensor, basis: Tensor | None, R: Tensor) -> Tensor | None:
    """The gradient of a basis that was broadcast, in its dtype; matrices that are not finite give none to one that they
    share."""
    if basis is None:
        return None
    if dP is None:
        return torch.zeros_like(basis, memory_format=torch.contiguous_format)
    dP = dP.reshape(*V.shape[:-2], *basis.shape[-2:])
    if dP.shape != basis.shape and R.numel():
        dP = torch.where(R[..., :1, :1].isnan(), 0.0, dP)
    return dP.sum_to_size(basis.shape).to(basis.dtype).contiguous()


def _forward(
    V: list[Tensor], against: list[Tensor], given: list[bool], rank_tol: float | None, deficient: str, backend: str
) -> list[Tensor]:
    refuse_forward_mode_below_autograd("gram_schmidt", (*V, *against))
    return run_forward(V, unpack_bases(against, given), rank_tol, deficient, decide(V[0], backend))


def _forward_fake(
    V: list[Tensor], against: list[Tensor], given: list[bool], rank_tol: float | None, deficient: str, backend: str
) -> list[Tensor]:
    return [
        *(torch.empty_like(t) for t in V),
        *(t.new_empty(*t.shape[:-2], t.shape[-1], t.shape[-1], dtype=accumulation_dtype(t.dtype)) for t in V),
        *(t.new_empty(t.shape[:-2], dtype=torch.int32) for t in V),
    ]


def _backward(
    dQ: list[Tensor],
    dR: list[Tensor],
    V: list[Tensor],
    against: list[Tensor],
    given: list[bool],
    Q: list[Tensor],
    R: list[Tensor],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    bases = unpack_bases(against, given)
    need_P = iter(needs[len(V) :])
    of_bases = [there and next(need_P) for there in given]
    chosen = choose(V[0], backend).backend
    dVs, dPs = run_backward(dQ, dR, V, bases, Q, R, needs[: len(V)], of_bases, chosen)
    wanted = dVs + [dP for dP, there in zip(dPs, given, strict=True) if there]
    return [V[0].new_empty(0) if g is None else g for g in wanted]


def _backward_fake(
    dQ: list[Tensor],
    dR: list[Tensor],
    V: list[Tensor],
    against: list[Tensor],
    given: list[bool],
    Q: list[Tensor],
    R: list[Tensor],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    like = [torch.empty_like(t) for t in V] + [t.new_empty(t.shape) for t in against]
    return [t if need else V[0].new_empty(0) for t, need in zip(like, needs, strict=True)]


gram_schmidt = define_operator(
    "gram_schmidt(Tensor[] V, Tensor[] against, bool[] given, float? rank_tol, str deficient, str backend) -> Tensor[]",
    _forward,
    _forward_fake,
)
gram_schmidt_backward = define_operator(
    "gram_schmidt_backward(Tensor[] dQ, Tensor[] dR, Tensor[] V, Tensor[] against, bool[] given, Tensor[] Q, "
    "Tensor[] R, bool[] needs, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
