r"""Losses that keep tasks apart, and the small linear algebra around them.

Routing orthogonality (C-LoRA, arXiv 2502.17920, eq. 26), Q an r×c basis of what the old routing R_old uses:

    L = Σ_layers ‖Qᵀ·R_δ‖²_F             dL/dR_δ = 2·Q·Qᵀ·R_δ

Overlap of rows (of A: O-LoRA), A the new rows and A_old those of earlier tasks:

    L = Σ_ij |A·A_oldᵀ|_ij               dL/dA = sign(A·A_oldᵀ)·A_old        sign(0) = 0

AGO (DAC, arXiv 2601.22828), B_T the columns of a task's experts, B_old those of earlier tasks, l layers:

    L = 1/l·Σ_layers Σ_ij |B_Tᵀ·B_old|_ij          dL/dB_T = 1/l·B_old·sign(B_oldᵀ·B_T)

Soft cross-entropy and block weights (CL-LoRA, CVPR 2025), p_z = softmax(z/τ) by rows, S rows:

    L = −1/S·Σ p_t·log p_s               dL/ds = (p_s − p_t)/(τ·S)
                                         dL/dt = p_t ⊙ (g − Σ p_t·g)/(τ·S), g = −log p_s
    L = 1/T·Σ_i |cos(μ, μ_i)|            dL/dμ = 1/T·Σ_i sign(c_i)·(μ_i/(‖μ‖·‖μ_i‖) − c_i·μ/‖μ‖²), c_i = cos(μ, μ_i)
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
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


def pairwise_overlap(new: Tensor, old: Tensor) -> Tensor:
    """The sum of |⟨a, b⟩| over all rows a of ``new`` and b of ``old``, and over all leading dimensions; a 0-dim tensor.

    Args:
        new: ``[..., r, K]``.
        old: ``[..., c, K]``; gets a gradient too where it requires one.

    Raises:
        ValueError: shapes that do not fit.
    """
    if new.shape[:-2] != old.shape[:-2] or new.shape[-1] != old.shape[-1]:
        raise ValueError(
            f"old: got shape {tuple(old.shape)}, expected [..., c, K] with the leading dimensions and K of new, "
            f"{tuple(new.shape)}"
        )
    return (new @ old.mT).abs().sum()


def ago(experts: Sequence[Tensor], old: Sequence[Tensor]) -> Tensor:
    """The mean over layers of Σ_ij |B_Tᵀ·B_old|_ij (DAC, arXiv 2601.22828); a 0-dim tensor on the first one's device.

    Args:
        experts: B_T of each layer, ``[N, k]``: the columns of lora_B that the task would leave behind.
        old: B_old of each layer, ``[N, c]``: those of earlier tasks; gets a gradient too where it requires one.

    Raises:
        ValueError: no layer, as many of the one as not of the other, shapes that do not fit.
    """
    if not experts or len(experts) != len(old):
        raise ValueError(f"old: got {len(old)} layers, expected those of experts, {len(experts)}, at least one")
    overlaps = [pairwise_overlap(B.mT, B_old.mT) for B, B_old in zip(experts, old, strict=True)]
    return torch.stack([overlap.to(overlaps[0].device) for overlap in overlaps]).mean()


def soft_cross_entropy(logits: Tensor, target_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """−Σ softmax(target_logits/τ)·log softmax(logits/τ), the mean over rows; a 0-dim tensor, not multiplied by τ².
    Gradients flow into both: detach the targets where they are given.

    Args:
        logits, target_logits: ``[..., classes]``.

    Raises:
        ValueError: shapes that differ.
    """
    if logits.shape != target_logits.shape:
        raise ValueError(f"target_logits: got shape {tuple(target_logits.shape)}, expected {tuple(logits.shape)}")
    wanted = F.softmax(target_logits / temperature, -1)
    return -(wanted * F.log_softmax(logits / temperature, -1)).sum(-1).mean()


def block_weight_penalty(weights: Tensor, old: Tensor) -> Tensor:
    """Mean over tasks of |cos(weights, old_i)|; a 0-dim tensor. At right angles, and for weights that are zero, the
    cosine is zero and the gradient that of torch's abs there, zero.

    Args:
        weights: μ ``[n]``.
        old: those of earlier tasks, ``[T, n]``, T at least 1.

    Raises:
        ValueError: shapes that do not fit.
    """
    if weights.dim() != 1 or old.dim() != 2 or old.shape[1:] != weights.shape or not len(old):
        raise ValueError(f"old: got shape {tuple(old.shape)}, expected [T, n] for weights {tuple(weights.shape)}")
    return F.cosine_similarity(weights, old, dim=-1).abs().mean()


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


def check_weight(name: str, value: float) -> None:
    """Raise, naming the argument, TypeError for what is no number and ValueError for one that no loss is weighed by."""
    check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value!r}, expected a finite weight of at least 0")


def check_number(name: str, value: float) -> None:
    """Raise TypeError, naming the argument, for what is no number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")


def relative_norm(parts: Iterable[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]) -> float | None:
    """‖changes‖_F/‖wholes‖_F over all parts, each a change and a whole as :func:`low_rank_norm` takes a product; None
    where the wholes are zero, NaN where a number is NaN."""
    changed, whole = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for change, of in parts:
        changed += low_rank_norm(*change).square().cpu()
        whole += low_rank_norm(*of).square().cpu()
    return None if whole == 0 else float((changed / whole).sqrt())


def low_rank_norm(left: Tensor, right: Tensor) -> Tensor:
    """‖left·rightᵀ‖_F for ``left [K, c]`` and ``right [N, c]`` without forming K·N numbers; a 0-dim fp64 tensor.

    Through QR of both factors, so a difference of two nearly equal products written as
    ``left = [A, A′]``, ``right = [B, −B′]`` loses no digits to squaring.
    """
    return torch.linalg.matrix_norm(torch.linalg.qr(left.double(), "r").R @ torch.linalg.qr(right.double(), "r").R.mT)
