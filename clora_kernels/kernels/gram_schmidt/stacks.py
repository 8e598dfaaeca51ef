"""Matrices of a list that have one shape, as one stack: a handful of launches for all factors of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .algebra import Columns


def flat(t: Tensor, lead: Sequence[int] | None = None) -> Tensor:
    """t [..., m, n], broadcast to the leading dimensions ``lead`` if they are given, as [B, m, n]."""
    t = t if lead is None else t.expand(*lead, *t.shape[-2:])
    return t if t.dim() == 3 else t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:])


def columns_of(V: Tensor, against: Tensor | None) -> Columns:
    """The arguments of a call as [B, d, r] and [B, d, k]; a basis without columns is none."""
    if against is None or against.shape[-1] == 0:
        return Columns(flat(V), None)
    return Columns(flat(V), flat(against, V.shape[:-2]))


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[B₁ + B₂ + .., m, n] of tensors [B, m, n]; one alone is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def alike(columns: Sequence[Columns]) -> list[list[int]]:
    """The places of those that can be stacked, group by group."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (V, P) in enumerate(columns):
        key = (V.shape[1:], V.mT.is_contiguous(), None if P is None else (P.shape[1:], P.dtype))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def parts(whole: Tensor | None, sizes: Sequence[int]) -> list[Tensor | None]:
    """The tensors of a stack, each with a storage of its own: outputs of one operator may not share one."""
    if whole is None or len(sizes) == 1:
        return [whole] * len(sizes)
    return [part.clone() for part in whole.split(list(sizes))]
