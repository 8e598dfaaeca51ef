"""Rank-1 experts for users: those that each row chose, applied; and their rows as tensors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dispatch.choice import Choice, check_backend
from ...dispatch.indices import check_range
from ...dispatch.rank1_experts import choose, decide, rank1_experts_gather, run_forward
from ...dispatch.rank1_experts import rank1_experts as operator
from ...library import autocast_is_on, refuse_forward_mode, without_autocast
from ...reference import rank1_experts as reference
from ..routed_lora.arguments import check_shape, check_tensor, check_x, scaling_tensor
from ..routed_lora.function import is_plain
from .arguments import check_chosen, check_gates, check_index_tensor, check_pool
from .function import Rank1ExpertsEagerFunction, Rank1ExpertsFunction


class GatheredExperts(NamedTuple):
    """Rows of the chosen experts, ``[*indices.shape, K]`` and ``[*indices.shape, N]``; gates are in B."""

    A: Tensor
    B: Tensor


def rank1_experts(
    x: Tensor,
    experts_A: Tensor,
    experts_B: Tensor,
    indices: Tensor,
    gates: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    base_output: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""The rank-1 experts that each row of x chose from one pool, weighted and summed::

        y = base_output + scaling · Σ_i gates_i · (x·a_e) · b_e,    e = indices_i,   a_e, b_e: rows of the pool

    No copy of the chosen rows is made where the compiled part serves; backward is deterministic, duplicates included.
    Equations, and their gradients: ``clora_kernels.reference.rank1_experts``. The pool is that of PEER (He, *Mixture of
    A Million Experts*, arXiv 2407.04153), without its activation, and of DAC (arXiv 2601.22828).

    Args:
        x: ``[..., K]``, fp32, bf16, fp16 or fp64; any strides.
        experts_A, experts_B: ``[E, K]`` and ``[E, N]``, any float dtypes; gradients come back in them, summed in fp32.
        indices: int32 or int64, 0 to E − 1, duplicates count as often: ``[..., k]``, k of them for each token, or
            ``[S, k]`` with S = x.shape[0], which all tokens of a sample share.
        gates: weights of the shape of ``indices``; None counts as ones.
        scaling: a number, or a 0-dim tensor, which may learn.
        base_output: ``[..., N]``, any float dtype; y has its dtype, else that of ``x``. The sum is fp32, rounded once.
        backend: "auto", "native" (compiled), "aten", "triton" (GPUs; made for samples of many tokens), or "reference"
            (plain PyTorch, which copies the chosen rows and can be differentiated any number of times).

    Returns:
        y ``[..., N]``. Under autocast x is converted as F.linear would, and the pool is not.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected, before anything runs.
        IndexError: an index outside the pool, on a CPU. On a GPU, where this would wait for the device, such an index
            is taken for the nearest expert, or raises with the environment variable ``CLORA_CHECK_INDICES=1``.
        RuntimeError: when differentiated twice, or in forward mode, with a backend other than "reference".
    """
    x, scale = prepare(x, experts_A, experts_B, indices, gates, scaling, base_output)
    compiling = torch.compiler.is_compiling()  # then the operator chooses, and checks indices, when it runs
    if backend != "reference":
        refuse_forward_mode("rank1_experts", (x, experts_A, experts_B, gates, scale, base_output))
    if compiling and backend != "reference":
        check_backend(backend)
        return operator(x, experts_A, experts_B, indices, gates, scale, base_output, backend)[0]
    if not compiling:
        check_range("indices", indices, experts_A.shape[0])
    choice = decide(math.prod(x.shape[:-1]), x.dtype, experts_A, experts_B, indices, backend)
    if choice.backend == "reference":
        with without_autocast(x):
            return reference.forward(x, experts_A, experts_B, indices, gates, scaling=scale, base_output=base_output)
    arguments = (x, experts_A, experts_B, indices, gates, scale, base_output)
    tensors = [t for t in arguments if t is not None]
    if not is_plain(x, tensors):
        return Rank1ExpertsFunction.apply(*arguments, backend)[0]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return Rank1ExpertsEagerFunction.apply(*arguments, backend, choice)
    return run_forward(*arguments, choice)[0]


def gather_rank1_experts(
    experts_A: Tensor, experts_B: Tensor, indices: Tensor, gates: Tensor | None = None
) -> GatheredExperts:
    """The rows of chosen experts as tensors, gates multiplied into those of ``experts_B``: small dense LoRAs, with
    which y = (x·Aᵀ)·B.

    Args:
        experts_A, experts_B, indices, gates: as in :func:`rank1_experts`; ``indices`` of any leading dimensions
            ``[..., k]``, for samples ``[S, k]``.

    Returns:
        ``GatheredExperts(A, B)``: ``[..., k, K]`` and ``[..., k, N]`` in the dtypes of the pool, contiguous copies.
        Gradients flow to both sides and to the gates, summed in a fixed order.

    Raises:
        ValueError, TypeError, IndexError: as :func:`rank1_experts`.
        RuntimeError: when differentiated twice.
    """
    check_pool(experts_A, experts_B)
    check_index_tensor(indices, experts_A)
    check_gates(gates, indices)
    return GatheredExperts(
        rank1_experts_gather(experts_A, indices, None), rank1_experts_gather(experts_B, indices, gates)
    )


def prepare(
    x: Any, experts_A: Any, experts_B: Any, indices: Any, gates: Any, scaling: Any, base_output: Any
) -> tuple[Tensor, Tensor]:
    """x, in the dtype in which it runs, and scaling as a tensor; all is checked but the values of indices."""
    check_x(x)
    check_tensor("experts_A", experts_A, x.device)
    check_pool(experts_A, experts_B, K=x.shape[-1])
    check_chosen(x, indices, gates, experts_A)
    scale = scaling_tensor(scaling, x)
    if base_output is not None:
        check_tensor("base_output", base_output, x.device)
        check_shape("base_output", base_output, (*x.shape[:-1], experts_B.shape[1]), "x.shape[:-1] + (out_features,)")
    if autocast_is_on(x) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x, scale


def explain_call(arguments: dict[str, Any]) -> Choice:
    """The choice for a call of :func:`rank1_experts` with these bound arguments, which are checked as it would."""
    backend = arguments.pop("backend")
    x, _ = prepare(**arguments)
    experts_A, experts_B, indices = (arguments[k] for k in ("experts_A", "experts_B", "indices"))
    check_range("indices", indices, experts_A.shape[0])
    return choose(math.prod(x.shape[:-1]), x.dtype, experts_A, experts_B, indices, backend)
