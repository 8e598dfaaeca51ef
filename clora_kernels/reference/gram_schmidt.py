r"""What Gram-Schmidt computes, in plain PyTorch.

Forward, on the columns of V [d, r] with an orthonormal basis P [d, k] to stay orthogonal to (Björck, *Numerics of
Gram-Schmidt orthogonalization*, 1994):

    V′ = V − P·(PᵀV)                                          what is left beside P
    w_j = v′_j − Σ_{i<j} q_i·R_ij,   R_ij = q_iᵀ·v′_j          what is left beside the earlier columns
    ‖w_j‖ >  rank_tol·‖v_j‖  :  q_j = w_j/‖w_j‖, R_jj = ‖w_j‖   j is independent
    ‖w_j‖ ≤  rank_tol·‖v_j‖  :  q_j = 0, row j of R = 0         j is dependent, and dropped

so V = P·(PᵀV) + Q·R with R upper triangular and diag(R) ≥ 0, up to what is dropped. A column is measured by its own
norm: scaling it never changes the rank. Each projection is made twice, which is enough (Kahan and Parlett; Giraud,
Langou, Rozložník and van den Eshof, *Rounding error analysis of the classical Gram-Schmidt orthogonalization process*,
2005). Columns are scaled by powers of two while this runs: no scale over- or underflows.

A matrix that holds NaN or Inf, or whose P does, gets NaN in Q and R and rank −1.

Backward, with J the independent and D the dependent columns, dR cut to its upper triangle (Walter and Lehmann, *On
evaluating higher-order derivatives of the QR decomposition*, 2010, for J; the set J is locally constant):

    dQ_J ← dQ_J + V′_D·dR_JDᵀ                                  R_JD = Q_JᵀV′_D
    M    = R_JJ·dR_JJᵀ − dQ_Jᵀ·Q_J
    D₀_J = (dQ_J + Q_J·copyltu(M))·R_JJ⁻ᵀ                      copyltu(M): the lower triangle, mirrored
    D₀_D = Q_J·dR_JD                                           the gradient of V′
    dV   = (I − P·Pᵀ)·D₀
    dP   = −D₀·(PᵀV)ᵀ − V·(D₀ᵀP)

dP is that of one projection; along the orthonormal matrices, as in P = qr(Z).Q, any number of them has this gradient.

deficient="random" completes Q to r orthonormal columns: in the place of a dependent column j stands column j of
:func:`completion`, orthogonalised against P, the independent columns and those completed before it. Its row of R stays
zero, and no gradient flows through it.

Rounding contract: sums are fp32 (fp64 for fp64 V), Q is rounded to V.dtype once, R stays in fp32; backward reads the
rounded Q.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout_mask import philox_4x32_10
from .routed_lora import accumulation_dtype

_COMPLETION_KEY = (0x9E3779B9, 0x7F4A7C15)


class GramSchmidtResult(NamedTuple):
    """Q [..., d, r] in the dtype of V, R [..., r, r] in fp32 (fp64 for fp64 V), rank [...] int32, −1 where the input
    was not finite."""

    Q: Tensor
    R: Tensor
    rank: Tensor


class Gradients(NamedTuple):
    """Gradients in the order of the public function's tensor arguments; None for one that was not given."""

    V: Tensor
    against: Tensor | None


def empty_result(V: Tensor) -> GramSchmidtResult:
    """The result for a V [..., d, r] without elements: no column, or columns that are zero."""
    acc, r = accumulation_dtype(V.dtype), V.shape[-1]
    R = V.new_zeros(*V.shape[:-2], r, r, dtype=acc) + V.sum((-2, -1), dtype=acc)[..., None, None]
    return GramSchmidtResult(V * 1, R, V.new_zeros(V.shape[:-2], dtype=torch.int32))


def tolerance(rank_tol: float | None, dtype: torch.dtype) -> float:
    """``rank_tol``, by default 64·eps of the arithmetic on ``dtype``."""
    return _default_tolerance(dtype) if rank_tol is None else rank_tol


@cache
def _default_tolerance(dtype: torch.dtype) -> float:
    return 64 * torch.finfo(accumulation_dtype(dtype)).eps


def completion(d: int, r: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """The [d, r] odd integers from −65535 to 65535 of which dependent columns are completed; the same on every device.

    Element (i, j) is 2·lane − 65535 for 16-bit lane i % 8, low half of each word first, of Philox-4x32-10 at counter
    (i // 8, j, 0, 0) under a fixed key.
    """
    zero = torch.zeros((), dtype=torch.int64, device=device)
    counter = (
        torch.arange((d + 7) // 8, device=device)[:, None],
        torch.arange(r, device=device)[None, :],
        zero,
        zero,
    )
    words = philox_4x32_10(counter, (zero + _COMPLETION_KEY[0], zero + _COMPLETION_KEY[1]))
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1)
    return (2 * lanes - 65535).reshape(-1, r)[:d].to(dtype)


def scale_exponents(V: Tensor) -> Tensor:
    """For each column of V [..., d, r] the power of two that brings its largest element into [1/2, 1); int32
    [..., 1, r], 0 for a zero column."""
    return torch.frexp(V.detach().abs().amax(-2, keepdim=True)).exponent


def powers_of_two(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, int]:
    """All that are normal numbers of fp32 or fp64, exact, and the place of 1 among them."""
    bits, bias, mantissa = (torch.int64, 1023, 52) if dtype == torch.float64 else (torch.int32, 127, 23)
    return (torch.arange(1, 2 * bias + 1, dtype=bits, device=device) << mantissa).view(dtype), bias - 1


def times_power(t: Tensor, exponent: Tensor) -> Tensor:
    """t·2^exponent without overflow on the way: 2^149, which lifts the smallest fp32 number to 1, is no fp32 number.

    The powers are looked up, for torch.func.vmap cannot look at the bits of what it maps over.
    """
    powers, one = powers_of_two(t.dtype, t.device)
    places = exponent.long() + 2 * one
    half = places // 2
    return t * powers[half] * powers[places - half]


def _projected(basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """basisᵀ·w and basis·(basisᵀ·w) for w [..., d]."""
    c = (basis.mT @ w[..., None])[..., 0]
    return c, (basis @ c[..., None])[..., 0]


def forward(
    V: Tensor, against: Tensor | None = None, *, rank_tol: float | None = None, deficient: str = "zero"
) -> GramSchmidtResult:
    """Q, R and rank of the equations above for V [..., d, r], differentiable by autograd any number of times.

    deficient: "zero" or "random". A projection that is repeated is a constant: it is zero but for rounding, and so is
    its derivative.
    """
    acc, tol = accumulation_dtype(V.dtype), tolerance(rank_tol, V.dtype)
    (d, r), lead = V.shape[-2:], V.shape[:-2]
    if V.numel() == 0:
        return empty_result(V)
    wide = V.to(acc)
    finite = wide.detach().isfinite().all(-1).all(-1)
    P = None
    if against is not None:
        P = against.to(acc).expand(*lead, *against.shape[-2:])
        finite = finite & P.detach().isfinite().all(-1).all(-1)
        P = torch.where(finite[..., None, None], P, torch.zeros_like(P))
    wide = torch.where(finite[..., None, None], wide, torch.zeros_like(wide))
    exponent = scale_exponents(wide)
    scaled = times_power(wide, -exponent)
    columns: list[Tensor] = []
    R_columns: list[Tensor] = []
    independent: list[Tensor] = []
    for j in range(r):
        v = scaled[..., j]
        w = v if P is None else v - _projected(P, v)[1]
        Q = torch.stack(columns, -1) if columns else wide.new_zeros(*lead, d, 0)
        c, inside = _projected(Q, w)
        w = w - inside
        basis = (Q if P is None else torch.cat([P, Q], -1)).detach()
        again, inside = _projected(basis, w.detach())
        w = w - inside
        c = c + again[..., again.shape[-1] - j :]
        norm = torch.linalg.vector_norm(w.detach(), dim=-1)
        keep = norm > tol * torch.linalg.vector_norm(v.detach(), dim=-1)
        w = torch.where(keep[..., None], w, torch.ones_like(w))  # a norm that can be differentiated
        norm = torch.linalg.vector_norm(w, dim=-1)
        columns.append(torch.where(keep[..., None], w / norm[..., None], torch.zeros_like(w)))
        diagonal = torch.where(keep, norm, torch.zeros_like(norm))[..., None]
        R_columns.append(torch.cat([c, diagonal, c.new_zeros(*lead, r - j - 1)], -1))
        independent.append(keep)
    Q, R = torch.stack(columns, -1), times_power(torch.stack(R_columns, -1), exponent)
    kept = torch.stack(independent, -1)
    if deficient == "random":
        Q = Q + _completed(Q.detach(), None if P is None else P.detach(), kept)
    poison = torch.where(finite, 1.0, torch.nan).to(acc)[..., None, None]
    rank = torch.where(finite, kept.sum(-1), -1).to(torch.int32)
    return GramSchmidtResult((Q * poison).to(V.dtype), R * poison, rank)


def _completed(Q: Tensor, P: Tensor | None, kept: Tensor) -> Tensor:
    """In the places of dependent columns orthonormal ones, zero in the others."""
    candidates = completion(Q.shape[-2], Q.shape[-1], Q.device, Q.dtype)
    found = torch.zeros_like(Q)
    for j in range(Q.shape[-1]):
        basis = Q + found if P is None else torch.cat([P, Q + found], -1)
        w = candidates[:, j].expand(Q.shape[:-1])
        for _ in range(2):
            w = w - _projected(basis, w)[1]
        w = w / torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        found[..., j] = torch.where(kept[..., j, None], torch.zeros_like(w), w)
    return found


def backward(dQ: Tensor, dR: Tensor, V: Tensor, against: Tensor | None, Q: Tensor, R: Tensor) -> Gradients:
    """The gradients of the equations above, derived by hand, for Q and R of :func:`forward`; each in the dtype of its
    argument."""
    acc = accumulation_dtype(V.dtype)
    kept = R.diagonal(dim1=-2, dim2=-1) != 0
    rows, columns = kept[..., :, None], kept[..., None, :]
    zero = torch.zeros((), dtype=acc, device=V.device)
    Q_J, dQ_J = (torch.where(columns, t.to(acc), zero) for t in (Q, dQ))
    dR = torch.where(rows, dR.to(acc).triu(), zero)
    V_acc = V.to(acc)
    P = None if against is None else against.to(acc).expand(*V.shape[:-2], *against.shape[-2:])
    V_left = V_acc if P is None else V_acc - P @ (P.mT @ V_acc)
    dQ_J = dQ_J + torch.where(columns, zero, V_left) @ torch.where(columns, zero, dR).mT
    R_JJ = torch.where(rows & columns, R, zero)
    M = R_JJ @ torch.where(columns, dR, zero).mT - dQ_J.mT @ Q_J
    mirrored = M.tril() + M.tril(-1).mT
    solvable = R_JJ + torch.diag_embed((~kept).to(acc))
    D0 = torch.linalg.solve_triangular(solvable.mT, dQ_J + Q_J @ mirrored, upper=False, left=False)
    D0 = torch.where(columns, D0, Q_J @ dR)
    if P is None:
        return Gradients(D0.to(V.dtype), None)
    inside = P.mT @ D0
    dP = -D0 @ (P.mT @ V_acc).mT - V_acc @ inside.mT
    return Gradients((D0 - P @ inside).to(V.dtype), dP.sum_to_size(against.shape).to(against.dtype))
