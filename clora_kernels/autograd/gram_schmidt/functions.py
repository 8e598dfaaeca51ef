"""Gram-Schmidt for users: one matrix or a batch, a list of matrices, and the basis alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dispatch.choice import Choice, check_backend
from ...dispatch.gram_schmidt import check_rank, choose, decide, run_forward
from ...dispatch.gram_schmidt import gram_schmidt as operator
from ...library import refuse_forward_mode, without_autocast
from ...reference import gram_schmidt as reference
from ...reference.gram_schmidt import GramSchmidtResult
from ..routed_lora.function import is_plain
from .arguments import check_basis, check_deficient, check_list, check_matrix, check_rank_tol
from .function import GramSchmidtEagerFunction, GramSchmidtFunction


class OrthonormalBasis(NamedTuple):
    """Q [..., d, r], its first ``rank`` columns orthonormal, the others zero or removed; rank [...] int32."""

    Q: Tensor
    rank: Tensor


def gram_schmidt(
    V: Tensor,
    against: Tensor | None = None,
    *,
    rank_tol: float | None = None,
    deficient: str = "zero",
    backend: str = "auto",
) -> GramSchmidtResult:
    r"""Orthonormalise the columns of each matrix, in their order, and beside a basis that is there already::

        V = against·(againstᵀV) + Q·R        QᵀQ = I on the independent columns, againstᵀQ = 0, diag(R) >= 0

    Where V has full rank this is ``torch.linalg.qr`` with signs such that diag(R) > 0. Any input is orthonormalised to
    working precision: block Cholesky-QR where it is safe, columns one by one, each projected twice, where it is not, as
    each matrix needs. All equations, and their sources: ``clora_kernels.reference.gram_schmidt``.

    Args:
        V: ``[..., d, r]``, fp32, bf16, fp16 or fp64; any strides (pass ``lora_A.mT``), any batch dimensions, none of
            them, or no matrix at all. With r > d at most d columns are independent.
        against: ``[..., d, k]``, orthonormal columns, in leading dimensions that broadcast to those of V: the basis of
            earlier tasks. Its orthonormality is taken on trust, and what it lacks leaks into Q, whose columns lose some
            of theirs with it: keep it in fp32, whatever the dtype of V; one rounded to bf16 leaks about 2⁻⁹ of itself.
        rank_tol: column j is dependent where what is left of it beside ``against`` and the columns before it is at most
            ``rank_tol`` times its own norm, so that scaling a column never changes the rank; from the eps of the
            arithmetic to 1, by default 64·eps (fp32 for 16-bit V).
        deficient: what becomes of dependent columns. "zero": they are zero in Q, and so are their rows of R. "random":
            Q is completed to r orthonormal columns, drawn after all columns, the same draw for the same shape; their
            rows of R are zero, and no gradient flows through them. "raise": ``torch.linalg.LinAlgError``, which waits
            for the device.
        backend: "auto", "aten" (which waits for a GPU but while a graph is captured), "native" (CPU, where the
            extension is built), "triton" (GPUs), or "reference" (plain PyTorch, differentiable any number of times).

    Returns:
        ``GramSchmidtResult(Q, R, rank)``: Q ``[..., d, r]`` in the dtype and memory layout of V, R ``[..., r, r]``
        upper triangular in fp32 (fp64 for fp64 V), rank ``[...]`` int32. A matrix that holds NaN or Inf has NaN in Q
        and R and rank −1; it touches no other. Gradients flow through Q and R to V and ``against``; at a dependent
        column they are those of the set of dependent columns held fixed. Autocast changes nothing: sums are fp32 at
        least.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected, before anything runs.
        torch.linalg.LinAlgError: with ``deficient="raise"``, for a matrix with dependent columns, NaN or Inf.
        RuntimeError: when differentiated twice, or in forward mode, with a backend other than "reference".
    """
    check_matrix("V", V)
    if against is not None:
        check_basis("against", against, V, "V")
    return _run([V], [against], rank_tol, deficient, backend)[0]


def gram_schmidt_foreach(
    matrices: Sequence[Tensor],
    against: Sequence[Tensor | None] | None = None,
    *,
    rank_tol: float | None = None,
    deficient: str = "zero",
    backend: str = "auto",
) -> list[GramSchmidtResult]:
    """:func:`gram_schmidt` of many matrices of any shapes, as all LoRA factors of a model, in a handful of launches.

    Args:
        matrices: V ``[..., d, r]`` each, of one dtype and device. None at all gives an empty list.
        against: a basis or None for each; None for none at all.
        rank_tol, deficient, backend: as in :func:`gram_schmidt`.

    Returns:
        One :class:`GramSchmidtResult` a matrix, what :func:`gram_schmidt` gives for it.

    Raises:
        As :func:`gram_schmidt`, the argument's name followed by its place in the list.
    """
    Vs, bases = _check_lists(matrices, against)
    if not Vs:
        check_backend(backend)
        check_deficient(deficient, [], [])
        return []
    return _run(Vs, bases, rank_tol, deficient, backend)


def orthonormal_basis(
    V: Tensor,
    against: Tensor | None = None,
    *,
    rank_tol: float | None = None,
    trim: bool = False,
    backend: str = "auto",
) -> OrthonormalBasis:
    """An orthonormal basis of what the columns of V span beside ``against``.

    Args:
        V, against, rank_tol, backend: as in :func:`gram_schmidt`.
        trim: cut the columns beyond the rank off; for one matrix ``[d, r]``, and waits for the device.

    Returns:
        ``OrthonormalBasis(Q, rank)``: Q ``[..., d, r]`` in the dtype of V, whose first ``rank`` columns are the basis,
        in the order of the columns they come of, and whose others are zero; ``[d, rank]`` with ``trim``. rank ``[...]``
        int32, −1 where the matrix holds NaN or Inf and Q is NaN. Differentiable as :func:`gram_schmidt`.

    Raises:
        ValueError, TypeError: as :func:`gram_schmidt`; ``trim`` for a batch.
        torch.linalg.LinAlgError: with ``trim``, where V or ``against`` holds NaN or Inf.
    """
    check_matrix("V", V)
    _check_trim(trim, V)
    Q, R, rank = gram_schmidt(V, against, rank_tol=rank_tol, backend=backend)
    dropped = R.detach().diagonal(dim1=-2, dim2=-1) == 0
    order = dropped.to(torch.uint8).argsort(dim=-1, stable=True)
    Q = Q.gather(-1, order[..., None, :].expand(Q.shape))
    if trim:
        if rank < 0:
            raise torch.linalg.LinAlgError("V: got a matrix with NaN or Inf, expected one that has a basis")
        Q = Q[:, : int(rank)]
    return OrthonormalBasis(Q, rank)


def _check_lists(
    matrices: Sequence[Tensor], against: Sequence[Tensor | None] | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The matrices of a list and the basis of each."""
    Vs = check_list("matrices", matrices)
    bases: list[Tensor | None] = [None] * len(Vs)
    if against is not None:
        if not isinstance(against, Sequence) or isinstance(against, str):
            raise TypeError(f"against: got {type(against).__name__}, expected a sequence of tensors or None")
        bases = list(against)
        if len(bases) != len(Vs):
            raise ValueError(f"against: got {len(bases)} for {len(Vs)} matrices, expected one, or None, for each")
    for i, (V, basis) in enumerate(zip(Vs, bases, strict=True)):
        check_basis(f"against[{i}]", basis, V, f"matrices[{i}]")
    return Vs, bases


def _check_trim(trim: Any, V: Tensor) -> None:
    if not isinstance(trim, bool):
        raise TypeError(f"trim: got {type(trim).__name__}, expected True or False")
    if trim and V.dim() != 2:
        raise ValueError(f"trim: got True for V of shape {tuple(V.shape)}, expected one matrix [d, r]")


def _run(
    Vs: list[Tensor], bases: list[Tensor | None], rank_tol: float | None, deficient: str, backend: str
) -> list[GramSchmidtResult]:
    if rank_tol is not None:
        check_rank_tol(rank_tol, Vs[0].dtype)
    if deficient != "zero":
        check_deficient(deficient, Vs, bases)
    compiling = torch.compiler.is_compiling()  # then the operator chooses when it runs
    if compiling:
        check_backend(backend)
    chosen = backend if compiling else decide(Vs[0], backend)
    if chosen == "reference":
        return _reference(Vs, bases, rank_tol, deficient)
    tensors, given = [*Vs, *(P for P in bases if P is not None)], tuple(P is not None for P in bases)
    refuse_forward_mode("gram_schmidt", tensors)
    n = len(Vs)
    out: Sequence[Tensor]
    if compiling:  # the operator has the gradients of the Function
        out = operator(tensors[:n], tensors[n:], given, rank_tol, deficient, backend)
    elif not is_plain(Vs[0], tensors):
        out = GramSchmidtFunction.apply(given, rank_tol, deficient, chosen, *tensors)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out = GramSchmidtEagerFunction.apply(given, rank_tol, deficient, chosen, *tensors)
    else:
        out = run_forward(Vs, bases, rank_tol, deficient, chosen)
    return [GramSchmidtResult(out[i], out[n + i], out[2 * n + i]) for i in range(n)]


def _reference(
    Vs: list[Tensor], bases: list[Tensor | None], rank_tol: float | None, deficient: str
) -> list[GramSchmidtResult]:
    with without_autocast(Vs[0]):
        results = [
            reference.forward(V, P, rank_tol=rank_tol, deficient=deficient) for V, P in zip(Vs, bases, strict=True)
        ]
    if deficient == "raise":
        check_rank(results)
    return results


def explain_call(fn: Any, arguments: dict[str, Any]) -> Choice:
    """The choice for a call of one of the functions above with these bound arguments, which are checked as the call
    would."""
    rank_tol, deficient, backend = arguments["rank_tol"], arguments.get("deficient", "zero"), arguments["backend"]
    if fn is gram_schmidt_foreach:
        Vs, bases = _check_lists(arguments["matrices"], arguments["against"])
    else:
        Vs, bases = [arguments["V"]], [arguments["against"]]
        check_matrix("V", Vs[0])
        check_basis("against", bases[0], Vs[0], "V")
    if fn is orthonormal_basis:
        _check_trim(arguments["trim"], Vs[0])
    check_deficient(deficient, Vs, bases)
    if not Vs:
        check_backend(backend)
        return Choice("none", "nothing to do", "the list is empty")
    check_rank_tol(rank_tol, Vs[0].dtype)
    return choose(Vs[0], backend)
