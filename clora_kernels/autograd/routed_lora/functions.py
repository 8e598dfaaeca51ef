"""Routed LoRA for users: the fused layer, several layers of one x, and the adapter alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch.choice import Choice
from ...dispatch.routed_lora import choose
from .arguments import check_tensor
from .calls import RoutedLoRA, check_training, draw, prepare, run, run_plain

_PLACE = "adapters[{}]."


def routed_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    routing: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    frozen_routing: Tensor | None = None,
    routing_index: Tensor | None = None,
    gate: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    r"""A frozen linear layer and its routed LoRA in one sum::

        y = x·weightᵀ + bias + scaling · ((drop(x)·lora_Aᵀ) ⊙ gate) · (frozen_routing + routing) · lora_Bᵀ

    With neither ``routing`` nor ``gate`` this is LoRA (Hu et al., arXiv 2106.09685); with both routings it is C-LoRA
    (arXiv 2502.17920, eq. 4-5 and 11-17): ``frozen_routing`` carries earlier tasks, counts in y, dx, dgate and the
    gradient of ``scaling``, and lora_A and lora_B learn through ``routing`` alone. All equations:
    ``clora_kernels.reference.routed_lora``.

    Args:
        x: ``[..., K]``, fp32, bf16, fp16 (fp64 for checks); any leading dims, any strides, no rows at all.
        weight: ``[N, K]`` in the dtype of ``x``. Gets a gradient if it requires one; costs nothing if not.
        lora_A, lora_B: ``[r, K]`` and ``[N, r]``, any float dtype (usually fp32 under a 16-bit ``x``): rounded to
            x.dtype once, gradients accumulated in fp32 and returned in the parameter's dtype. x and weight are never
            upcast.
        routing: ``[r, r]``, or a bank ``[T, r, r]`` of which ``routing_index`` chooses one a sample. None is the
            identity.
        bias: ``[N]``.
        frozen_routing: a constant of the shape of ``routing``.
        routing_index: int64 or int32 ``[S]`` with S = x.shape[0]. Out of range: IndexError on a CPU; on a GPU clamped,
            or IndexError with the environment variable ``CLORA_CHECK_INDICES=1`` (which syncs).
        gate: anything that broadcasts to ``x.shape[:-1] + (r,)``: a diagonal routing ``[r]``, a gate a sample
            ``[S, 1, r]`` or a token ``[S, L, r]``.
        scaling: a number, or a 0-dim tensor, which may require a gradient and never recompiles.
        dropout_p: probability with which an element of the adapter's x drops, in steps of 1/65536.
        dropout_seed: 0-dim int64 tensor that replays a draw; drawn from torch's generator if None.
        training: False switches dropout off.
        backend: "auto", "aten", "triton" (fused kernels on a GPU; "auto" takes it where a table made by ``python -m
            clora_kernels tune`` says that it wins), "native" (a plain layer on a CPU, where the extension is built),
            "composite" (a plain layer in fp32 or fp64 as matmuls that ATen differentiates; "auto" takes it on a CPU
            for next to nothing to compute), or "reference" (plain PyTorch, differentiable any number of times).

    Returns:
        y ``[..., N]`` in x.dtype (under ``torch.autocast``: in the autocast dtype). Operands are rounded to x.dtype
        once, sums are fp32, y is rounded once (on ATen matmuls in 16 bit once more where there is a bias, added last).

    Raises:
        ValueError, TypeError, IndexError: naming the argument, what came and what was expected, before anything runs.
        RuntimeError: when differentiated twice, or in forward mode, with a backend other than "reference" and
            "composite".
    """
    if backend == "auto" and routing is frozen_routing is routing_index is gate is dropout_seed is None:
        y = run_plain(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training)
        if y is not None:
            return y
    adapter = RoutedLoRA(
        weight, lora_A, lora_B, routing, bias, frozen_routing, routing_index, gate, scaling, dropout_p, dropout_seed
    )
    check_tensor("weight", weight)
    return run(x, [adapter], None, training, backend)[0]


def routed_lora_linear_group(
    x: Tensor, adapters: Sequence[RoutedLoRA], *, training: bool = True, backend: str = "auto"
) -> list[Tensor]:
    """Several routed LoRA layers of one x (q, k, v; gate, up): one read of x, one dx, summed in fp32 and rounded once.

    Args:
        x: ``[..., K]`` as in :func:`routed_lora_linear`.
        adapters: one :class:`RoutedLoRA` a layer, each with its own weight, options and dropout draw.
        training, backend: as in :func:`routed_lora_linear`.

    Returns:
        One y ``[..., N_j]`` a layer, what :func:`routed_lora_linear` gives for each.

    Raises:
        As :func:`routed_lora_linear`, the argument's name preceded by ``adapters[j].``.
    """
    return list(run(x, _checked_group(adapters), None, training, backend, _PLACE))


def _checked_group(adapters: Any) -> list[RoutedLoRA]:
    if not isinstance(adapters, Sequence):
        raise TypeError(f"adapters: got {type(adapters).__name__}, expected a sequence of RoutedLoRA")
    adapters = list(adapters)
    if not adapters:
        raise ValueError("adapters: got none, expected at least one RoutedLoRA")
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, RoutedLoRA):
            raise TypeError(f"adapters[{i}]: got {type(adapter).__name__}, expected a RoutedLoRA")
        check_tensor(f"adapters[{i}].weight", adapter.weight)
    return adapters


def routed_lora_delta(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    routing: Tensor | None = None,
    *,
    frozen_routing: Tensor | None = None,
    routing_index: Tensor | None = None,
    gate: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    training: bool = True,
    base_output: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The adapter alone, added onto the output of any base layer (quantised, tensor-parallel)::

        y = base_output + scaling · ((drop(x)·lora_Aᵀ) ⊙ gate) · (frozen_routing + routing) · lora_Bᵀ

    Args:
        base_output: ``[..., N]``, any float dtype; y has its dtype, else that of ``x``. The sum is fp32 and rounded
            once, but a base output that is itself rounded to 16 bit has already lost what lies below its last bit:
            prefer :func:`routed_lora_linear` wherever the weight is at hand.
        Everything else as in :func:`routed_lora_linear`.

    Returns:
        y ``[..., N]``.

    Raises:
        As :func:`routed_lora_linear`.
    """
    adapter = RoutedLoRA(
        None, lora_A, lora_B, routing, None, frozen_routing, routing_index, gate, scaling, dropout_p, dropout_seed
    )
    return run(x, [adapter], base_output, training, backend)[0]


def explain_call(fn: Any, arguments: dict[str, Any]) -> Choice:
    """The choice for a call of one of the functions above with these bound arguments."""
    base, prefix = arguments.get("base_output"), ""
    if fn is routed_lora_linear_group:
        adapters, prefix = _checked_group(arguments["adapters"]), _PLACE
    else:
        fields = {k: v for k, v in arguments.items() if k in RoutedLoRA._fields}
        adapters = [RoutedLoRA(**{"weight": None, **fields})]
        if fn is routed_lora_linear:
            check_tensor("weight", adapters[0].weight)
    check_training(arguments["training"])
    x, projections = prepare(arguments["x"], adapters, base, prefix)
    replayed = [a._replace(dropout_seed=torch.tensor(0)) for a in adapters]  # nothing is drawn for an explanation
    projections = [draw(j, a, arguments["training"], x) for j, a in zip(projections, replayed, strict=True)]
    return choose(x, projections, arguments["backend"])
