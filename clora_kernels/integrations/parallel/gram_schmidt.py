r"""Gram-Schmidt of columns whose rows lie on several ranks: Gram matrices are summed over the ranks, V never moves.

The algorithm is that of ``kernels.gram_schmidt.algebra`` with S = PᵀW and G = WᵀW summed (in fp64, k×r and r×r); the
r×r step and its judgement are made alike on each rank, and what is tall stays where it is. Columns that no sweep gets
done are orthonormalised one by one, where each of the two projections sums at most k + r numbers a matrix. Backward
sums QᵀdQ and, where there are any, PᵀdQ, PᵀV and QᵀV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...autograd.gram_schmidt.arguments import check_basis, check_matrix, check_rank_tol
from ...kernels.gram_schmidt import algebra, aten
from ...kernels.gram_schmidt.algebra import Columns, Outputs
from ...library import FirstOrderBackward, without_autocast
from ...modules.sharded import is_sharded
from ...reference.gram_schmidt import GramSchmidtResult, empty_result, tolerance


class _RowsOfRanks(aten.Rows):
    """Forward's questions, and the primitives of backward, where each rank of a group has some rows."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def sum(self, t: Tensor) -> Tensor:
        return self._reduced(t, dist.ReduceOp.SUM)

    def max(self, t: Tensor) -> Tensor:
        return self._reduced(t, dist.ReduceOp.MAX)

    def norm(self, w: Tensor) -> Tensor:
        return self.sum(super().norm(w).square()).sqrt()

    def _reduced(self, t: Tensor, operation: Any) -> Tensor:
        t = t.contiguous()
        dist.all_reduce(t, operation, self.group)
        return t

    def forward(self, columns: Columns, rank_tol: float) -> GramSchmidtResult:
        return aten.forward(columns, rank_tol, self)

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        return self.sum(aten.inner(left, right).double())

    def combine(self, terms: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        return aten.combine(terms, dtype)

    def deficient(self, R: Tensor) -> bool:
        return aten.deficient(R)

    def solve(
        self, R: Tensor, dR: Tensor, QdQ: Tensor, QV: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return aten.solve(R, dR, QdQ, QV, dtype)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, V: Tensor, P: Tensor | None, rank_tol: float, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(V):
            Q, R, rank = _RowsOfRanks(group).forward(Columns(V, P), rank_tol)
        ctx.save_for_backward(V, P, Q, R)
        ctx.group = group
        ctx.mark_non_differentiable(rank)
        return Q, R, rank

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        return *_Backward.apply(ctx.group, ctx.needs_input_grad[:2], *ctx.saved_tensors, *grads[:2]), None, None


class _Backward(FirstOrderBackward):
    UNSUPPORTED = "gram_schmidt_sharded: {} is not supported"

    @staticmethod
    def forward(
        group: Any, needs: tuple[bool, bool], V: Tensor, P: Tensor | None, Q: Tensor, R: Tensor, dQ: Tensor, dR: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        with without_autocast(V):
            dV, dP = algebra.backward(_RowsOfRanks(group), Outputs(Q, R, dQ, dR), Columns(V, P), *needs)
        return dV, None if P is None or dP is None else dP.to(P.dtype)


def gram_schmidt_sharded(
    V_local: Tensor, against_local: Tensor | None = None, *, group: Any = None, rank_tol: float | None = None
) -> GramSchmidtResult:
    """:func:`clora_kernels.gram_schmidt` of matrices whose rows are divided among ranks, as the factors of a layer that
    is cut along their length are::

        Q, R, rank = gram_schmidt_sharded(layer.lora_A.to_local().mT, group=mesh.get_group())   # RowParallel

    Every rank of the group calls it. Matrices are judged alike on all of them: R and rank are the same bits everywhere
    as long as an all-reduce gives them all the same bits and they compute r×r alike.

    Args:
        V_local: ``[..., d_i, r]``, this rank's rows, in any number, none of them too; everything else as on the others.
        against_local: ``[..., d_i, k]``, the same rows of an orthonormal basis.
        group: the ranks, a ProcessGroup; None for all of them.
        rank_tol: as in :func:`clora_kernels.gram_schmidt`.

    Returns:
        ``GramSchmidtResult(Q, R, rank)``: this rank's rows of Q ``[..., d_i, r]``, all of R and rank. Dependent columns
        are zero in Q. Gradients flow through Q and R, and backward is called on every rank too: what a loss of Q loses
        on each rank adds up, a loss of R is the same on all ranks and counts once.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected, on this rank alone; a DTensor, a
            group that this rank is not in.
        RuntimeError: without a process group; when differentiated twice.
    """
    check_matrix("V_local", V_local)
    check_basis("against_local", against_local, V_local, "V_local", rows="some")
    check_rank_tol(rank_tol, V_local.dtype)
    if is_sharded(V_local) or is_sharded(against_local):
        name = "V_local" if is_sharded(V_local) else "against_local"
        raise TypeError(f"{name}: got a DTensor, expected the rows of this rank: {name}.to_local()")
    if not dist.is_initialized():
        raise RuntimeError("group: got no process group, expected torch.distributed.init_process_group() before")
    if dist.get_rank(group) < 0:
        raise ValueError("group: got one without this rank, expected one of the ranks that call")
    (d, r), lead = V_local.shape[-2:], V_local.shape[:-2]
    if lead.numel() * r == 0:
        return empty_result(V_local)
    # A rank without rows takes part in every sum all the same.
    V = (V_local if d else F.pad(V_local, (0, 0, 0, 1))).reshape(-1, max(d, 1), r)
    P = against_local
    if P is not None:
        P = (P if d else F.pad(P, (0, 0, 0, 1))).expand(*lead, -1, -1).reshape(-1, max(d, 1), P.shape[-1])
    Q, R, rank = _Function.apply(V, P, tolerance(rank_tol, V.dtype), group)
    return GramSchmidtResult(Q[:, :d].reshape(*lead, d, r), R.reshape(*lead, r, r), rank.reshape(lead))
