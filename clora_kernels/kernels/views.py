"""Conversions that cost nothing where there is nothing to convert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, for a tenth of the time where nothing is to be done: small layers are made of such calls."""
    return t if t.dtype == dtype else t.to(dtype)


def unflatten(t: Tensor, lead: Sequence[int]) -> Tensor:
    """[M, n], new and contiguous, as [..., n]. Not as a view: a Function's output that is one cannot be changed in
    place."""
    return t if len(lead) == 1 else torch.ops.aten._unsafe_view.default(t, (*lead, t.shape[1]))


def flatten(t: Tensor) -> Tensor:
    """[..., n] as [M, n]; a view wherever strides allow one, M = 0 included."""
    # Size.numel() would tie a graph to this M
    return t if t.dim() == 2 else t[None] if t.dim() == 1 else t.flatten(0, -2)
