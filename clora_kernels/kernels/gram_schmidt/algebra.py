r"""Gram-Schmidt forward and backward, written once over primitives that a backend brings.

Notation as in ``reference.gram_schmidt``. Forward is a sweep of Cholesky-QR beside P, made once, twice, or not at all,
as each matrix needs (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, *Roundoff error analysis of the CholeskyQR2
algorithm*, 2015):

    gram      S = PᵀW,  G = WᵀW                                   one read of W
    step      R with RᵀR = G − SᵀS,  X = R⁻¹,  T = S·X            r×r, on columns of unit norm; and what to do next
    apply     W·X − P·T                                           one read of W
    deflate   the columns one by one, each projected twice        where a Gram matrix cannot tell what is dependent

The step judges what one sweep leaves. Entries of G are off by about ``g``·u of the norms of their columns (u: the unit
roundoff of the arithmetic), which gives QᵀQ an error of about g·u·‖G‖_F·max_k‖row k of (X, T)‖²; rounding X adds
u·‖X‖_F; and P, orthonormal to about ``BASIS``·u, leaves ``BASIS``·u·‖T‖_F of itself. A matrix whose sum is within
``ENOUGH``·√r·u is ``DONE``; one whose Gram matrix is off by ``STABLE`` at most goes ``AGAIN``, on the result of the
first sweep, which squares the error. What no second sweep mends is the rounding of W·X, of which R makes in column j of
Q·R about u·√Σ_k(‖column k of (X, T)‖·R_kj)²: more than ``FAITHFUL``·√r·u of that is ``HARD``, and so is all else: a
Gram matrix that is off by more, a column that may be dependent, squares that are no numbers. Q comes of two
applications, never of X₁·X₂.

Backward needs two reads of the tall operands, ``inner`` and ``combine``, and ``solve``, which is r×r, between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...reference.gram_schmidt import GramSchmidtResult, completion, empty_result
from ...reference.routed_lora import accumulation_dtype

DONE, AGAIN, HARD = 0, 1, 2
# Measured on the zoo in fp32, d from 67 to 1000, r from 12 to 256: ‖QᵀQ − I‖ is at most 2·u·√r after one sweep and
# 1.2·u·√r after two, and a column of Q·R is off by 0.9 of its estimate at most.
ENOUGH, STABLE, FAITHFUL, BASIS = 6.0, 0.01, 4.0, 8.0


class Columns(NamedTuple):
    """Matrices V [B, d, r] to orthonormalise, and P [B, d, k] beside which they are; any strides."""

    V: Tensor
    P: Tensor | None


class Outputs(NamedTuple):
    """Q [B, d, r] and R [B, r, r] of forward, and the gradients of both."""

    Q: Tensor
    R: Tensor
    dQ: Tensor
    dR: Tensor


class Primitives(Protocol):
    """What a backend brings."""

    def forward(self, columns: Columns, rank_tol: float) -> GramSchmidtResult:
        """Q in the dtype of V, R in the accumulation dtype, rank; V is not empty."""

    def deficient(self, R: Tensor) -> bool:
        """Whether a column was dropped: R has a zero on its diagonal; True where the backend does not ask."""

    def solve(
        self, R: Tensor, dR: Tensor, QdQ: Tensor, QV: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Y, Z and N [B, r, r] in ``dtype``, of fp64 arithmetic, with D₀ = dQ·Y + Q·Z + V′·N; of dR the upper triangle
        counts. Both N and ``QV`` = QᵀV are None where no R is ``deficient``."""

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """leftᵀ·right of tall operands, in the accumulation dtype."""

    def combine(self, terms: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        """Σ tall·small, rounded once to ``dtype``."""


def forward(kernels: Primitives, columns: Columns, rank_tol: float) -> GramSchmidtResult:
    """Q [B, d, r] in the dtype of V, R [B, r, r] and rank [B]; a dependent column is zero."""
    V = columns.V
    if V.numel() == 0:
        return empty_result(V)
    return kernels.forward(columns, rank_tol)


def complete(
    orthonormalise: Callable[[Columns], GramSchmidtResult], columns: Columns, result: GramSchmidtResult
) -> Tensor:
    """Q with random orthonormal columns in the places of dependent ones; Q unrounded, NaN stays. On a GPU, which is not
    waited for, ``orthonormalise`` gets every matrix, on a CPU those that have such places."""
    Q = result.Q
    places = (result.R.diagonal(dim1=-2, dim2=-1) == 0)[:, None, :]  # none where R is NaN
    chosen = places.flatten(1).any(1).nonzero()[:, 0] if Q.device.type == "cpu" else slice(None)
    if Q.numel() == 0 or (isinstance(chosen, Tensor) and not len(chosen)):
        return Q
    places, basis = places[chosen], Q[chosen]
    candidates = completion(Q.shape[-2], Q.shape[-1], Q.device, Q.dtype) * places
    if columns.P is not None:
        basis = torch.cat([columns.P[chosen].to(Q.dtype), basis], -1)
    Q = Q.clone()
    Q[chosen] += torch.where(places, orthonormalise(Columns(candidates, basis)).Q, 0.0)
    return Q


def backward(
    kernels: Primitives, outputs: Outputs, columns: Columns, need_V: bool, need_P: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dV [B, d, r] in the dtype of V, and dP [B, d, k] in the accumulation dtype; None for what is not needed."""
    (V, P), (Q, R, dQ, dR) = columns, outputs
    acc = accumulation_dtype(V.dtype)
    need_P = need_P and P is not None
    if V.numel() == 0:
        return (torch.zeros_like(V) if need_V else None), (torch.zeros_like(P, dtype=acc) if need_P else None)
    QV = kernels.inner(Q, V) if kernels.deficient(R) else None
    Y, Z, N = kernels.solve(R, dR, kernels.inner(Q, dQ), QV, acc if P is None else torch.float64)
    of_D0 = [(dQ, Y), (Q, Z)] + ([] if N is None else [(V, N)])  # the gradient of V′, but for what P takes of V·N
    if P is None:
        return kernels.combine(of_D0, V.dtype), None
    A = kernels.inner(P, dQ).double() @ Y  # PᵀD₀: P is orthogonal to Q and to V′
    S = kernels.inner(P, V).double() if need_P or N is not None else None
    inside = torch.zeros_like(A) if N is None else S @ N
    dV = dP = None
    if need_V:
        dV = kernels.combine([(tall, small.to(acc)) for tall, small in [*of_D0, (P, -inside - A)]], V.dtype)
    if need_P:
        of_V = -A.mT if N is None else -A.mT - N @ S.mT
        of_P = [(dQ, -Y @ S.mT), (Q, -Z @ S.mT), (V, of_V), (P, inside @ S.mT)]
        dP = kernels.combine([(tall, small.to(acc)) for tall, small in of_P], acc)
    return dV, dP
