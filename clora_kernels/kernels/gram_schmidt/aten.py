"""The primitives of Gram-Schmidt on ATen matmuls: every device, no compiler.

Gram matrices and what is r×r are fp64 whatever the dtype of V: in fp64 the Gram matrix of an fp32 matrix is exact
enough for one sweep in nearly every case. The second sweep and the deflation run for the matrices that need them, which
waits for the device; while a CUDA graph is captured that cannot be, so they run for all and are kept where they are
needed (some 2000 launches and 15 ms of kernels, forward and backward, for 64 matrices 4096×64 on an H200). Scratch: V
and P in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...reference.gram_schmidt import GramSchmidtResult, scale_exponents, times_power
from ...reference.routed_lora import accumulation_dtype
from ..views import cast
from .algebra import AGAIN, BASIS, DONE, ENOUGH, FAITHFUL, HARD, STABLE, Columns

_GRAM_ERROR = 8.0
"""Error of an entry of a Gram matrix of unit columns, in units of the roundoff of its fp64 sums."""
_LIMIT = 2.0**96
"""Norms of columns beyond it, or below its inverse, are scaled first, which deflation does."""


def _can_wait(t: Tensor) -> bool:
    """Whether values of ``t`` may be asked for."""
    return not t.is_cuda or not torch.cuda.is_current_stream_capturing()


def any(flags: Tensor) -> bool:
    """Whether a flag is set; True where that cannot be asked."""
    return not _can_wait(flags) or bool(flags.any())


def _factor(t: Tensor, acc: torch.dtype) -> Tensor:
    """A factor of a matmul that must be as exact as ``acc``: in fp64 where the user lets fp32 matmuls be less."""
    return cast(t, acc if acc == torch.float64 or _fp32_is_exact() else torch.float64)


def _fp32_is_exact() -> bool:
    """Whether fp32 matmuls are fp32 on every device; of what is set backend by backend torch tells nothing."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        return False


def combine(terms: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """Σ tall·small, rounded once to ``dtype``."""
    acc = accumulation_dtype(dtype)
    total: Tensor | None = None
    for tall, small in terms:
        left, right = _factor(tall, acc), _factor(small, acc)
        total = left @ right if total is None else torch.baddbmm(total, left, right)
    assert total is not None
    return cast(total, dtype)


def inner(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ·right of tall operands, in the accumulation dtype."""
    acc = accumulation_dtype(right.dtype)
    return cast(_factor(left, acc).mT @ _factor(right, acc), acc)


def deficient(R: Tensor) -> bool:
    """Whether a column was dropped; True where that cannot be asked."""
    return any(R.diagonal(dim1=-2, dim2=-1) == 0)


def solve(
    R: Tensor, dR: Tensor, QdQ: Tensor, QV: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Y, Z and N in ``dtype``; N is None without ``QV``."""
    Y, Z, N = _solved(R.double(), dR.double().triu(), QdQ.double(), None if QV is None else QV.double())
    return Y.to(dtype), Z.to(dtype), None if N is None else N.to(dtype)


def _solved(R: Tensor, dR: Tensor, QdQ: Tensor, QV: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    if QV is None:
        M = R @ dR.mT - QdQ.mT
        Y = torch.linalg.solve_triangular(R, eye, upper=True).mT
        return Y, (M.tril() + M.tril(-1).mT) @ Y, None
    kept = R.diagonal(dim1=-2, dim2=-1) != 0
    rows, columns = kept[:, :, None], kept[:, None, :]
    both = rows & columns
    zero = torch.zeros((), dtype=R.dtype, device=R.device)
    dR_JJ, dR_JD = torch.where(both, dR, zero), torch.where(rows & ~columns, dR, zero)
    M = torch.where(both, R @ dR_JJ.mT - QdQ.mT - dR_JD @ QV.mT, zero)
    Y = torch.linalg.solve_triangular(torch.where(both, R, eye), eye, upper=True).mT
    Z = torch.where(columns, (M.tril() + M.tril(-1).mT) @ Y, dR_JD)
    Y = torch.where(both, Y, zero)
    return Y, Z, dR_JD.mT @ Y


class Rows:
    """What is asked of all rows of V and P together. Here they are all of them; elsewhere each rank has some."""

    def sum(self, t: Tensor) -> Tensor:
        """Sums over rows, from those of the rows at hand."""
        return t

    def max(self, t: Tensor) -> Tensor:
        """Maxima over rows, from those of the rows at hand."""
        return t

    def norm(self, w: Tensor) -> Tensor:
        """Norms of the columns of w [B, d, 1]."""
        return torch.linalg.vector_norm(w, dim=1)


_ALL_HERE = Rows()


class Sweep(NamedTuple):
    """What a step found: X, R [B, r, r] upper triangular, T [B, k, r], and ``state`` [B], DONE, AGAIN or HARD."""

    X: Tensor
    T: Tensor | None
    R: Tensor
    state: Tensor


def forward(columns: Columns, rank_tol: float, rows: Rows = _ALL_HERE) -> GramSchmidtResult:
    """A sweep, a second one for those that go again, and what no sweep gets done column by column."""
    V, P = columns
    B, _, r = V.shape
    first = step(*gram(columns, rows), rank_tol, V.dtype)
    state, R, Q = first.state, first.R, torch.empty_like(V)
    apply(columns, first, Q)
    again = state == AGAIN
    if any(again):
        swept = Columns(torch.empty_like(V, dtype=accumulation_dtype(V.dtype)), P)
        apply(columns, first, swept.V, again)
        second = step(*gram(swept, rows), rank_tol, V.dtype, R)
        apply(swept, second, Q, again)
        R = torch.where(again[:, None, None], second.R, R)
        state = torch.where(again, second.state, state)
    rank = torch.full((B,), r, dtype=torch.int32, device=V.device)
    result = GramSchmidtResult(Q, R.to(accumulation_dtype(V.dtype)), rank)
    hard = state != DONE
    if any(hard):
        deflate(columns, hard, rank_tol, result, rows)
    return result


def gram(columns: Columns, rows: Rows = _ALL_HERE) -> tuple[Tensor | None, Tensor]:
    """S [B, k, r] and G [B, r, r] in fp64."""
    W = columns.V.double()
    S = None if columns.P is None else rows.sum(columns.P.double().mT @ W)
    return S, rows.sum(W.mT @ W)


def step(S: Tensor | None, G: Tensor, rank_tol: float, dtype: torch.dtype, before: Tensor | None = None) -> Sweep:
    """The r×r step in fp64 for columns of ``dtype``; X and T come rounded to the accumulation dtype, R as it is, after
    ``before``, the R of a sweep before it."""
    acc = accumulation_dtype(dtype)
    u, root = torch.finfo(acc).eps / 2, G.shape[-1] ** 0.5
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    norms = G.diagonal(dim1=-2, dim2=-1).sqrt()
    sound = ((norms > 1 / _LIMIT) & (norms < _LIMIT)).all(-1)[:, None, None]
    scale = 1 / torch.where(sound[..., 0], norms, 1.0)
    unit = torch.where(sound, G * scale[:, :, None] * scale[:, None, :], eye)
    inside = None if S is None else torch.where(sound, S * scale[:, None, :], 0.0)
    left = unit if inside is None else unit - inside.mT @ inside
    lower, info = torch.linalg.cholesky_ex(left)
    sound = sound & (info == 0)[:, None, None]
    R = torch.where(sound, lower.mT, eye)
    X = torch.linalg.solve_triangular(R, eye.expand_as(R), upper=True)
    T = None if inside is None else inside @ X
    factors = X.square() if T is None else torch.cat([X.square(), T.square()], -2)
    of_gram = _GRAM_ERROR * torch.finfo(G.dtype).eps / 2 * torch.linalg.matrix_norm(unit) * factors.sum(-1).amax(-1)
    of_T = 0.0 if T is None else BASIS * torch.linalg.matrix_norm(T)
    error = of_gram + u * (torch.linalg.matrix_norm(X) + of_T)
    of_columns = (factors.sum(-2)[:, None, :] @ R.square())[:, 0].amax(-1).sqrt()
    doubtful = (R.diagonal(dim1=-2, dim2=-1) <= 1.1 * rank_tol).any(-1)
    lost = doubtful | ~(of_gram <= STABLE) | ~(of_columns <= FAITHFUL * root) | ~sound[:, 0, 0]
    state = torch.where(lost, HARD, torch.where(error <= ENOUGH * u * root, DONE, AGAIN))
    norms = torch.where(sound[..., 0], norms, 1.0)
    R = R * norms[:, None, :]
    R = R if before is None else R @ before
    return Sweep((X * scale[:, :, None]).to(acc), None if T is None else T.to(acc), R, state)


def apply(columns: Columns, sweep: Sweep, out: Tensor, only: Tensor | None = None) -> None:
    """Write V·X − P·T to ``out``, rounded once, of all matrices or of those that ``only`` tells."""
    V, P = columns
    terms = [(V, sweep.X)] + ([] if P is None else [(P, -sweep.T)])
    swept = combine(terms, accumulation_dtype(V.dtype))
    out.copy_(swept if only is None else torch.where(only[:, None, None], swept.to(out.dtype), out))


def deflate(columns: Columns, hard: Tensor, rank_tol: float, result: GramSchmidtResult, rows: Rows = _ALL_HERE) -> None:
    """Write the result of the matrices that are ``hard``: fp64, one column after the other, each projected twice."""
    if _can_wait(hard):
        chosen = hard.nonzero()[:, 0]
        found = _deflated(Columns(*(None if t is None else t[chosen] for t in columns)), rank_tol, rows)
        for whole, part in zip(result, found, strict=True):
            whole[chosen] = part.to(whole.dtype)
        return
    for whole, part in zip(result, _deflated(columns, rank_tol, rows), strict=True):
        where = hard.reshape(-1, *[1] * (whole.dim() - 1))
        whole.copy_(torch.where(where, part.to(whole.dtype), whole))


def _deflated(columns: Columns, rank_tol: float, rows: Rows) -> GramSchmidtResult:
    V, P = columns
    B, d, r = V.shape
    k = 0 if P is None else P.shape[-1]
    basis = V.new_zeros(B, d, k + r, dtype=torch.float64)
    if P is not None:
        basis[..., :k] = P
    wide = V.double()
    broken = ~(wide.isfinite().all(1).all(1) & basis.isfinite().all(1).all(1))[:, None, None]
    finite = rows.max(broken.double()) == 0
    basis, wide = torch.where(finite, basis, 0.0), torch.where(finite, wide, 0.0)
    exponent = scale_exponents(rows.max(wide.abs().amax(1, keepdim=True)))
    wide = times_power(wide, -exponent)
    R = wide.new_zeros(B, r, r)
    for j in range(r):
        w = wide[..., j : j + 1]
        own = rows.norm(w)
        for _ in range(2):
            c = rows.sum(basis[..., : k + j].mT @ w)
            w = w - basis[..., : k + j] @ c
            R[:, :j, j] += c[:, k:, 0]
        norm = rows.norm(w)
        kept = norm > rank_tol * own
        basis[..., k + j] = torch.where(kept, w[..., 0] / torch.where(kept, norm, 1.0), 0.0)
        R[:, j, j] = torch.where(kept, norm, 0.0)[:, 0]
    rank = (R.diagonal(dim1=1, dim2=2) > 0).sum(-1)
    poison = torch.where(finite, 1.0, torch.nan)
    R = times_power(R, exponent) * poison
    return GramSchmidtResult(basis[..., k:] * poison, R, torch.where(finite[:, 0, 0], rank, -1))
