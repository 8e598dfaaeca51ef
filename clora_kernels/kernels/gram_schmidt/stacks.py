"""The algorithm for a list of matrices: those of one shape are one stack, so that all factors of a model take a handful
of launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...reference.gram_schmidt import GramSchmidtResult
from . import algebra
from .algebra import Columns, Outputs, Primitives


def flat(t: Tensor, lead: Sequence[int] | None = None) -> Tensor:
    """t [..., m, n], broadcast to the leading dimensions ``lead`` if they are given, as [B, m, n]."""
    t = t if lead is None else t.expand(*lead, *t.shape[-2:])
    return t if t.dim() == 3 else t.reshape(t.shape[:-2].numel(), *t.shape[-2:])


def columns_of(V: Tensor, against: Tensor | None) -> Columns:
    """The arguments of a call as [B, d, r] and [B, d, k]; a basis without columns is none."""
    if against is None or against.shape[-1] == 0:
        return Columns(flat(V), None)
    return Columns(flat(V), flat(against, V.shape[:-2]))


def forward(kernels: Primitives, columns: Sequence[Columns], rank_tol: float) -> list[GramSchmidtResult]:
    """``algebra.forward`` of each."""
    results: list[GramSchmidtResult] = [None] * len(columns)
    for places in _alike(columns):
        whole = algebra.forward(kernels, _stacked([columns[i] for i in places]), rank_tol)
        for i, result in zip(places, _parts(whole, [columns[i] for i in places]), strict=True):
            results[i] = GramSchmidtResult(*result)
    return results


def backward(
    kernels: Primitives, outputs: Sequence[Outputs], columns: Sequence[Columns], need_V: bool, need_P: bool
) -> list[tuple[Tensor | None, Tensor | None]]:
    """``algebra.backward`` of each."""
    results: list[tuple[Tensor | None, Tensor | None]] = [None] * len(columns)
    for places in _alike(columns):
        some = [columns[i] for i in places]
        whole = algebra.backward(kernels, _stacked([outputs[i] for i in places]), _stacked(some), need_V, need_P)
        for i, result in zip(places, _parts(whole, some), strict=True):
            results[i] = (result[0], result[1])
    return results


def _alike(columns: Sequence[Columns]) -> list[list[int]]:
    """The places of those that can be stacked, group by group."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (V, P) in enumerate(columns):
        key = (V.shape[1:], None if P is None else (P.shape[1:], P.dtype))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _stacked(records):  # type: ignore[no-untyped-def]
    """One record of tensors [B₁ + B₂ + .., m, n] of several of tensors [B, m, n]; one alone is not copied."""
    if len(records) == 1:
        return records[0]
    return type(records[0])(*(None if ts[0] is None else torch.cat(ts) for ts in zip(*records, strict=True)))


def _parts(whole: Sequence[Tensor | None], columns: Sequence[Columns]) -> list[list[Tensor | None]]:
    """The tensors of a stack for each of its members, with a storage of their own: outputs of one operator may not
    share one."""
    if len(columns) == 1:
        return [list(whole)]
    sizes = [c.V.shape[0] for c in columns]
    split = [[None] * len(sizes) if t is None else [part.clone() for part in t.split(sizes)] for t in whole]
    return [list(of_one) for of_one in zip(*split, strict=True)]
