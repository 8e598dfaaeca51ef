"""Checks of the arguments of Gram-Schmidt: each error names the argument, what came and what was expected."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch.gram_schmidt import DEFICIENT
from ...reference.routed_lora import accumulation_dtype
from ..routed_lora.arguments import check_tensor


def check_matrix(name: str, V: Any) -> None:
    """Raise unless V is a floating-point tensor [..., d, r]."""
    check_tensor(name, V)
    if V.dim() < 2:
        raise ValueError(f"{name}: got shape {tuple(V.shape)}, expected [..., d, r] = at least 2 dimensions")


def check_basis(name: str, against: Any, V: Tensor, of: str, rows: str = "all") -> None:
    """Raise unless ``against`` can be a basis beside V: that it is orthonormal is the caller's word. Of ``rows`` that
    are "some", columns may be more."""
    if against is None:
        return
    check_tensor(name, against)
    if against.device != V.device:
        raise ValueError(f"{name}: got device {against.device}, expected {V.device}, the device of {of}")
    d, lead = V.shape[-2], V.shape[:-2]
    if against.dim() < 2 or against.shape[-2] != d:
        raise ValueError(f"{name}: got shape {tuple(against.shape)}, expected [..., {d}, k], the d of {of}")
    if against.shape[-1] > d and rows == "all":
        raise ValueError(
            f"{name}: got {against.shape[-1]} columns of length {d}, expected at most {d}: more are no basis"
        )
    trailing = zip(reversed(against.shape[:-2]), reversed(lead), strict=False)
    if against.dim() > V.dim() or any(mine not in (1, theirs) for mine, theirs in trailing):
        raise ValueError(
            f"{name}: got leading dimensions {tuple(against.shape[:-2])}, expected ones that broadcast to "
            f"{tuple(lead)}, those of {of}"
        )


def check_rank_tol(rank_tol: Any, dtype: torch.dtype) -> None:
    """Raise unless ``rank_tol`` is None or a number from the eps of the arithmetic to 1."""
    if rank_tol is None:
        return
    if not isinstance(rank_tol, (numbers.Real, torch.SymFloat)) or isinstance(rank_tol, bool):
        raise TypeError(f"rank_tol: got {type(rank_tol).__name__}, expected a number or None")
    eps = torch.finfo(accumulation_dtype(dtype)).eps
    if not eps <= float(rank_tol) < 1:
        raise ValueError(
            f"rank_tol: got {rank_tol}, expected {eps:.3g} <= rank_tol < 1: what is below the eps of the arithmetic "
            "cannot be told from rounding"
        )


def check_deficient(deficient: Any, Vs: Sequence[Tensor], bases: Sequence[Tensor | None]) -> None:
    """Raise unless ``deficient`` is one of its values, and each Q can be completed if it is to be."""
    if deficient not in DEFICIENT:
        raise ValueError(f"deficient: got {deficient!r}, expected one of {', '.join(map(repr, DEFICIENT))}")
    if deficient != "random":
        return
    for V, basis in zip(Vs, bases, strict=True):
        d, r = V.shape[-2:]
        k = 0 if basis is None else basis.shape[-1]
        if k + r > d and V.shape[:-2].numel():
            beside = f" beside the {k} of against" if k else ""
            raise ValueError(
                f"deficient: got 'random' for {r} columns of length {d}{beside}, expected at most {d - k}: more cannot "
                "be orthonormal"
            )


def check_list(name: str, matrices: Any) -> list[Tensor]:
    """The matrices of a list, which have one dtype and device."""
    if not isinstance(matrices, Sequence) or isinstance(matrices, str):
        raise TypeError(f"{name}: got {type(matrices).__name__}, expected a sequence of tensors")
    for i, V in enumerate(matrices):
        check_matrix(f"{name}[{i}]", V)
        if V.dtype != matrices[0].dtype:
            raise TypeError(f"{name}[{i}]: got dtype {V.dtype}, expected {matrices[0].dtype}, that of {name}[0]")
        if V.device != matrices[0].device:
            raise ValueError(f"{name}[{i}]: got device {V.device}, expected {matrices[0].device}, that of {name}[0]")
    return list(matrices)
