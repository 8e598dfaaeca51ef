"""A zoo of matrices that are hard to orthonormalise, and the gates that a Gram-Schmidt must pass on every one.

Every matrix is alone in its hardness, so that a failure has a name: singular values that fall geometrically, Hilbert's
and Kahan's matrices, Läuchli's, whose Gram matrix loses all digits, nearly collinear columns, copies, zeros, exact
linear dependence, rows or columns of very different scale, scales whose squares over- or underflow, NaN and Inf.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.gram_schmidt import GramSchmidtResult, tolerance

CONDITIONS = tuple(range(0, 13, 2))


@dataclass(frozen=True)
class HardMatrix:
    """``V`` [d, r]; ``rank``: the number of its independent columns where that is beyond doubt, −1 where it holds NaN
    or Inf, else None."""

    name: str
    V: Tensor
    rank: int | None


def hard_matrices(
    d: int, r: int, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
) -> list[HardMatrix]:
    """The zoo for one shape.

    Args:
        d, r: of the matrices, r ≥ 4 and d > r.
        dtype: scales and dependences that it cannot hold are left out or made smaller: nothing overflows, and what is
            called exactly dependent is so in this dtype.

    Raises:
        ValueError: r < 4 or d ≤ r.
    """
    if r < 4 or d <= r:
        raise ValueError(f"d, r: got {d}, {r}, expected r >= 4 and d > r")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def orthonormal(rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(normal(rows, columns)).Q

    def integers(rows: int, columns: int) -> Tensor:
        return torch.randint(-2, 3, (rows, columns), generator=generator).double()

    found: list[tuple[str, Tensor, int | None]] = []
    steps = torch.linspace(0, 1, r, dtype=torch.float64)
    for power in CONDITIONS:
        V = orthonormal(d, r) * 10.0 ** (-power * steps) @ orthonormal(r, r)
        found.append((f"condition_1e{power}", V, r if power <= 2 else None))
    i, j = torch.arange(d)[:, None], torch.arange(r)[None, :]
    found.append(("hilbert", 1.0 / (i + j + 1).double(), None))
    below = (i == j + 1).double()
    found.append(("laeuchli", (i == 0) + 2.0**-7 * below, r if dtype != torch.bfloat16 else None))
    found.append(("laeuchli_lost", (i == 0) + torch.finfo(dtype).eps / 8 * below, None))
    cosine = 0.5 if r <= 16 else 0.1
    sine = (1 - cosine**2) ** 0.5
    kahan = sine ** torch.arange(r)[:, None] * (torch.eye(r) - cosine * torch.ones(r, r).triu(1)).double()
    found.append(("kahan", orthonormal(d, r) @ kahan, None))
    found.append(("near_collinear", normal(d, 1) + 1e-4 * normal(d, r), None))
    found.append(("far_from_centre", 30 + normal(d, r), r))
    few = max(r // 3, 2)
    found.append(("duplicates", normal(d, few)[:, torch.arange(r) % few], few))
    found.append(("multiples", normal(d, 1) * 2.0 ** torch.arange(-(r // 2), r - r // 2).clamp(-6, 6), 1))
    dense = normal(d, r)
    found.append(("zero_columns", torch.where(j % 3 == 1, 0.0, dense), r - (r + 1) // 3))
    found.append(("all_zero", torch.zeros(d, r, dtype=torch.float64), 0))
    left, right = integers(d, few), integers(few, r)
    found.append(("rank_deficient", left @ right, int(torch.linalg.matrix_rank(left @ right))))
    smallest = 1e-12 if dtype != torch.float16 else 1e-3
    of_rows = smallest ** torch.linspace(0, 1, d, dtype=torch.float64)[:, None]
    found.append(("rows_scaled", normal(d, r) * of_rows, None))
    found.append(("columns_scaled", normal(d, r) * smallest**steps, r))
    found.append(("columns_scaled_up", normal(d, r) * smallest ** steps.flip(0), r))
    for name, scale in (("scale_1e-20", 1e-20), ("scale_1e18", 1e18)):
        limits = torch.finfo(dtype)
        found.append((name, normal(d, r) * min(max(scale, 64 * limits.tiny), limits.max / 64), r))
    found.append(("nan", torch.where((i == d // 2) & (j == r - 1), torch.nan, dense), -1))
    found.append(("inf", torch.where((i == 0) & (j == 0), -torch.inf, dense), -1))
    return [HardMatrix(name, V.to(dtype).to(device), rank) for name, V, rank in found]


def mixed_batch(matrices: Iterable[HardMatrix], easy: int = 8, seed: int = 0) -> tuple[Tensor, list[HardMatrix]]:
    """[B, d, r] of these matrices and ``easy`` well-conditioned ones in random order, and the same as a list."""
    matrices = list(matrices)
    generator = torch.Generator().manual_seed(seed)
    like = matrices[0].V
    for _ in range(easy):
        V = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype).to(like.device)
        matrices.append(HardMatrix("easy", V, like.shape[1]))
    order = torch.randperm(len(matrices), generator=generator).tolist()
    shuffled = [matrices[i] for i in order]
    return torch.stack([m.V for m in shuffled]), shuffled


@dataclass(frozen=True)
class Orthogonality:
    """How far a result is from what it should be, in fp64, each number over its gate: at most 1 passes.

    orthogonality: ‖QᵀQ − I‖_F of the independent columns; reconstruction: the largest ‖v_j − P·(Pᵀv_j) − Q·R_j‖ of a
    column over its own norm; leakage: ‖PᵀQ‖_F. ``problem`` tells of what no number measures.
    """

    orthogonality: float
    reconstruction: float
    leakage: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and max(self.orthogonality, self.reconstruction, self.leakage) <= 1

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        return (
            f"orthogonality {self.orthogonality:.3g}, reconstruction {self.reconstruction:.3g}, leakage "
            f"{self.leakage:.3g} of what is allowed"
        )


GATES = {torch.float64: 2.0**-49, torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""How far Q may be from orthonormal, a column from its reconstruction, PᵀQ from zero, over √r, by the dtype of Q."""


@torch.no_grad()
def orthogonality(
    result: GramSchmidtResult,
    V: Tensor,
    against: Tensor | None = None,
    *,
    rank: int | None = None,
    rank_tol: float | None = None,
    completed: bool = False,
) -> Orthogonality:
    """One result of :func:`gram_schmidt` against the gates.

    Args:
        result: for one matrix V [d, r].
        rank: what it must be, if that is known; −1 for a matrix that is not finite.
        rank_tol: that of the call.
        completed: the call had ``deficient="random"``: all columns of Q are orthonormal.
    """
    Q, R, found = result.Q, result.R, int(result.rank)
    if rank is not None and found != rank:
        return Orthogonality(0, 0, 0, f"got rank {found}, expected {rank}")
    if found == -1:
        untrue = [name for name, t in (("Q", Q), ("R", R)) if not t.isnan().all()]
        return Orthogonality(0, 0, 0, f"{untrue} of a matrix that is not finite holds numbers" if untrue else "")
    if problem := _structure(Q, R, found, completed):
        return Orthogonality(0, 0, 0, problem)
    r = V.shape[1]
    gate = GATES[Q.dtype] * max(r, 1) ** 0.5
    kept = R.diagonal() > 0
    Q, R, V = Q.double(), R.double(), V.double()
    identity = torch.eye(r, dtype=Q.dtype, device=Q.device) * (kept | completed)
    error = V - Q @ R
    leakage = Q.new_zeros(())
    if against is not None:
        P = against.double()
        error = error - P @ (P.mT @ V)
        leakage = torch.linalg.matrix_norm(P.mT @ Q)
    norms = torch.linalg.vector_norm(V, dim=0).clamp(min=torch.finfo(Q.dtype).tiny)
    dropped = max(tolerance(rank_tol, result.Q.dtype), gate if result.Q.dtype.itemsize == 2 else 0.0)
    allowed = torch.where(kept, gate, dropped)
    columns = torch.linalg.vector_norm(error, dim=0) / norms / allowed
    return Orthogonality(
        float(torch.linalg.matrix_norm(Q.mT @ Q - identity) / gate),
        float(columns.max()) if r else 0.0,
        float(leakage / gate),
    )


def _structure(Q: Tensor, R: Tensor, rank: int, completed: bool) -> str:
    """What is wrong with the zeros and signs of a finite result."""
    if not (Q.isfinite().all() and R.isfinite().all()):
        return "Q or R of a finite matrix is not finite"
    if R.tril(-1).any():
        return "R is not upper triangular"
    kept = R.diagonal() > 0
    if (R.diagonal() < 0).any():
        return "the diagonal of R has a negative element"
    if int(kept.sum()) != rank:
        return f"R has {int(kept.sum())} positive diagonal elements, expected the rank, {rank}"
    if R[~kept].any():
        return "the row of R of a dependent column is not zero"
    if Q[:, ~kept].any() and not completed:
        return "the column of Q of a dependent column is not zero"
    return ""


def assert_orthonormal(
    result: GramSchmidtResult,
    V: Tensor,
    against: Tensor | None = None,
    *,
    ranks: list[int | None] | None = None,
    rank_tol: float | None = None,
    completed: bool = False,
) -> None:
    """Hold a result for V [..., d, r] to the gates, matrix by matrix; arguments as of :func:`orthogonality`.

    Raises:
        AssertionError: naming each matrix that fails.
    """
    d, r = V.shape[-2:]
    B = V.shape[:-2].numel()
    P = None if against is None else against.expand(*V.shape[:-2], *against.shape[-2:]).reshape(B, d, against.shape[-1])
    flat = GramSchmidtResult(result.Q.reshape(B, d, r), result.R.reshape(B, r, r), result.rank.reshape(B))
    failed = []
    for i, matrix in enumerate(V.reshape(B, d, r)):
        found = orthogonality(
            GramSchmidtResult(flat.Q[i], flat.R[i], flat.rank[i]),
            matrix,
            None if P is None else P[i],
            rank=None if ranks is None else ranks[i],
            rank_tol=rank_tol,
            completed=completed,
        )
        if not found.ok:
            failed.append(f"  matrix {i}: {found}")
    if failed:
        raise AssertionError("beyond the gates of orthogonality:\n" + "\n".join(failed))
