"""Experts added into the weight."""

from __future__ import annotations

from torch import Tensor

from ...dispatch.rank1_experts import rank1_experts_gather
from ...library import without_autocast
from ...reference.routed_lora import accumulation_dtype
from ..routed_lora.arguments import check_tensor, scaling_tensor
from .arguments import check_gates, check_index_tensor, check_pool


def merge_rank1_experts(
    weight: Tensor,
    experts_A: Tensor,
    experts_B: Tensor,
    indices: Tensor,
    gates: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
) -> Tensor:
    """The weight whose frozen linear equals the linear with these experts for every row::

        weight + scaling · Σ_i gates_i · b_e · a_eᵀ,    e = indices_i

    Args:
        weight: ``[N, K]``; not changed.
        experts_A, experts_B, scaling: as in :func:`rank1_experts`.
        indices, gates: ``[k]``; a choice that differs by sample or token has no merged weight.

    Returns:
        ``[N, K]`` in the dtype of ``weight``: products and the sum in fp32 (fp64 for an fp64 weight), rounded once.
        Differentiable. The fp32 copy takes 4·N·K bytes while it runs; rows can be merged block by block, each with its
        columns of ``experts_B``.

    Raises:
        ValueError, TypeError, IndexError: as :func:`rank1_experts`.
    """
    check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected (N, K) = (out_features, in_features)")
    check_tensor("experts_A", experts_A, weight.device, of="weight")
    check_pool(experts_A, experts_B, K=weight.shape[1], N=weight.shape[0])
    check_index_tensor(indices, experts_A)
    if indices.dim() != 1:
        raise ValueError(f"indices: got shape {tuple(indices.shape)}, expected (k,): one choice for every row")
    check_gates(gates, indices)
    acc = accumulation_dtype(weight.dtype)
    s = scaling_tensor(scaling, weight)
    with without_autocast(weight):
        A, B = (rank1_experts_gather(t, indices, None).to(acc) for t in (experts_A, experts_B))
        B = B * s if gates is None else B * (gates.to(acc) * s)[:, None]
        return (weight.to(acc) + B.mT @ A).to(weight.dtype)
