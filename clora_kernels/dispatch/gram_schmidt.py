"""Gram-Schmidt: the dispatch rule and the operators ``torch.ops.clora_kernels.gram_schmidt`` and
``gram_schmidt_backward``.

One operator serves one call and a list of matrices of different shapes. Bases travel as the list of those that are
there and ``given``, which says for each V whether it has one: dispatcher schemas have no differentiable lists of
optional tensors. Results come as all Q, then all R, then all ranks; gradients as those of V, then those of the bases
that are there, an empty tensor for one that is not wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..kernels.gram_schmidt import aten
from ..kernels.gram_schmidt.algebra import Columns, Primitives, backward, complete, forward
from ..kernels.gram_schmidt.stacks import alike, columns_of, flat, parts, stacked
from ..library import define_operator, without_autocast
from ..reference.gram_schmidt import GramSchmidtResult, tolerance
from ..reference.routed_lora import accumulation_dtype
from .choice import Choice, check_backend, unavailable

DEFICIENT = ("zero", "random", "raise")


def choose(V: Tensor, backend: str = "auto") -> Choice:
    """The rule: what is named runs or raises; ``auto`` is ``aten``, which is proved on every device."""
    check_backend(backend)
    if backend in ("triton", "native"):
        reason = f"it is not built for {V.dtype} on {V.device.type}; use 'auto' or 'aten'"
        raise unavailable("gram_schmidt", backend, reason)
    return _choice(backend if backend == "reference" else "aten", V.device.type, backend)


@cache
def _choice(chosen: str, device_type: str, backend: str) -> Choice:
    named = "named by the caller"
    if chosen == "reference":
        return Choice(chosen, "plain PyTorch, column by column", f"{named}; differentiable twice, slower, more memory")
    strategy = "Cholesky-QR with fp64 Gram matrices, once or twice, and column by column where it must be"
    return Choice(chosen, strategy, named if backend == chosen else f"ATen matmuls are proved on {device_type}")


def _primitives(backend: str) -> Primitives:
    return aten


def unpack_bases(against: Sequence[Tensor], given: Sequence[bool]) -> list[Tensor | None]:
    """For each V its basis, or None."""
    remaining = iter(against)
    return [next(remaining) if there else None for there in given]


def run_forward(
    Vs: Sequence[Tensor], bases: Sequence[Tensor | None], rank_tol: float | None, deficient: str, backend: str
) -> list[Tensor]:
    """All Q, all R, all ranks, in the leading dimensions of each V."""
    with without_autocast(Vs[0].device.type):
        columns = [columns_of(V, P) for V, P in zip(Vs, bases, strict=True)]
        results: list[GramSchmidtResult] = [None] * len(Vs)
        for places in alike(columns):
            chosen = [columns[i] for i in places]
            whole = _run(_stack(chosen), tolerance(rank_tol, Vs[0].dtype), deficient, backend)
            sizes = [c.V.shape[0] for c in chosen]
            for i, *found in zip(places, *(parts(t, sizes) for t in whole), strict=True):
                results[i] = _shaped(GramSchmidtResult(*found), Vs[i])
        if deficient == "raise":
            check_rank(results)
        return [t for of_all in zip(*results, strict=True) for t in of_all]


def _shaped(result: GramSchmidtResult, V: Tensor) -> GramSchmidtResult:
    lead, r = V.shape[:-2], V.shape[-1]
    return GramSchmidtResult(_laid_out(result.Q, V), result.R.reshape(*lead, r, r), result.rank.reshape(lead))


def _stack(columns: Sequence[Columns]) -> Columns:
    P = None if columns[0].P is None else stacked([c.P for c in columns])
    return Columns(stacked([c.V for c in columns]), P)


def _run(columns: Columns, rank_tol: float, deficient: str, backend: str) -> GramSchmidtResult:
    kernels, V = _primitives(backend), columns.V
    if deficient != "random":
        return forward(kernels, columns, rank_tol)
    # what completes Q must be orthogonal to it before it is rounded
    wide = columns._replace(V=V.to(accumulation_dtype(V.dtype)))
    result = forward(kernels, wide, rank_tol)
    return result._replace(Q=complete(kernels, wide, result, rank_tol).to(V.dtype))


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with the shape and the strides of ``torch.empty_like(like)``, as the fakes promise."""
    t, out = t.reshape(like.shape), torch.empty_like(like, device="meta")
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
    dVs: list[Tensor | None] = [None] * len(Vs)
    dPs: list[Tensor | None] = [None] * len(Vs)
    kernels = _primitives(backend)
    with without_autocast(Vs[0].device.type):
        columns = [columns_of(V, P) for V, P in zip(Vs, bases, strict=True)]
        for places in alike(columns):
            dQ, dR, Q, R = (stacked([flat(t[i]) for i in places]) for t in (dQs, dRs, Qs, Rs))
            wants = any(need_V[i] for i in places), any(need_P[i] for i in places)
            whole = backward(kernels, dQ, dR, _stack([columns[i] for i in places]), Q, R, *wants)
            sizes = [columns[i].V.shape[0] for i in places]
            for i, dV, dP in zip(places, *(parts(t, sizes) for t in whole), strict=True):
                dVs[i] = None if dV is None or not need_V[i] else _laid_out(dV, Vs[i])
                dPs[i] = _of_basis(dP, Vs[i], bases[i]) if need_P[i] else None
    return dVs, dPs


def _of_basis(dP: Tensor | None, V: Tensor, basis: Tensor | None) -> Tensor | None:
    """The gradient of a basis that was broadcast, in its dtype."""
    if basis is None:
        return None
    if dP is None:
        return torch.zeros_like(basis, memory_format=torch.contiguous_format)
    return dP.reshape(*V.shape[:-2], *basis.shape[-2:]).sum_to_size(basis.shape).to(basis.dtype).contiguous()


def _forward(
    V: list[Tensor], against: list[Tensor], given: list[bool], rank_tol: float | None, deficient: str, backend: str
) -> list[Tensor]:
    return run_forward(V, unpack_bases(against, given), rank_tol, deficient, choose(V[0], backend).backend)


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


def why_not_native(dtype: torch.dtype, device_type: str) -> str:
    """Why the compiled operators cannot run such a tensor; empty if they can."""
    return f"it is not built for {dtype} on {device_type}"
