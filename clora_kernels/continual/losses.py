r"""Losses that keep tasks apart, and the small linear algebra around them.

Routing orthogonality (C-LoRA, arXiv 2502.17920, eq. 26), Q an r×c basis of what the old routing R_old uses:

    L = Σ_layers ‖Qᵀ·R_δ‖²_F             dL/dR_δ = 2·Q·Qᵀ·R_δ

Absolute overlap (the AGO loss of DAC, arXiv 2601.22828) of columns B with the columns O of earlier tasks:

    L = Σ|Bᵀ·O|                          dL/dB = O·sign(Bᵀ·O)ᵀ, with sign(0) = 0
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor


def routing_orthogonality(routing: Tensor, basis: Tensor) -> Tensor:
    """‖basisᵀ·routing‖²_F summed over all leading dimensions; a 0-dim tensor.

    Args:
        routing: R_δ ``[..., r, r]``.
        basis: Q_old ``[..., r, c]``; zero columns count nothing.

    Raises:
        ValueError: shapes that do not fit.
    """
    if routing.shape[:-2] != basis.shape[:-2] or routing.shape[-2] != basis.shape[-2]:
        raise ValueError(
            f"basis: got shape {tuple(basis.shape)}, expected [..., r, c] with the leading dimensions and r of "
            f"routing, {tuple(routing.shape)}"
        )
    return (basis.mT @ routing).square().sum()


def absolute_overlap(columns: Tensor, old: Tensor) -> Tensor:
    """Σ|columnsᵀ·old|, a 0-dim tensor. Where a column is orthogonal to an old one, or zero, the subgradient 0 counts.

    Args:
        columns: ``[N, c]``, what learns.
        old: ``[N, m]``.

    Raises:
        ValueError: shapes that do not fit.
    """
    if columns.dim() != 2 or old.dim() != 2 or columns.shape[0] != old.shape[0]:
        raise ValueError(f"old: got shape {tuple(old.shape)}, expected [N, m] beside columns {tuple(columns.shape)}")
    return (columns.mT @ old).abs().sum()


def leading_left_singular_vectors(matrix: Tensor, energy: float = 0.9) -> Tensor:
    """The fewest leading left singular vectors that hold ``energy`` of ‖matrix‖²_F, as columns; the other columns are
    zero.

    Args:
        matrix: ``[..., r, r]``. A zero matrix has no leading vectors: all columns are zero.
        energy: from 0 to 1; 1 takes every vector with a singular value above rounding (r·eps of the largest).

    Returns:
        ``[..., r, r]`` in the matrix' dtype.

    Raises:
        TypeError, ValueError: energy that is no number from 0 to 1.
    """
    check_fraction("energy", energy)
    left, sigma, _ = torch.linalg.svd(matrix.double())
    held = sigma.square().cumsum(-1)
    before = held - sigma.square()
    eps = torch.finfo(matrix.dtype).eps
    wanted = (before < energy * held[..., -1:]) & (sigma > matrix.shape[-1] * eps * sigma[..., :1])
    return (left * wanted[..., None, :]).to(matrix.dtype)


def check_fraction(name: str, value: float) -> None:
    """Raise, naming the argument, TypeError for what is no number and ValueError for one outside [0, 1]."""
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: got {value!r}, expected a fraction from 0 to 1")


def check_number(name: str, value: float) -> None:
    """Raise TypeError, naming the argument, for what is no number."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")


def low_rank_norm(left: Tensor, right: Tensor) -> Tensor:
    """‖left·rightᵀ‖_F for ``left [K, c]`` and ``right [N, c]`` without forming K·N numbers; a 0-dim fp64 tensor.

    Through QR of both factors, so a difference of two nearly equal products written as
    ``left = [A, A′]``, ``right = [B, −B′]`` loses no digits to squaring.
    """
    return torch.linalg.matrix_norm(torch.linalg.qr(left.double(), "r").R @ torch.linalg.qr(right.double(), "r").R.mT)
