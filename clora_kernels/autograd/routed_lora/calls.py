"""A call of routed LoRA from its checked arguments to the backend that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dispatch.choice import check_backend
from ...dispatch.routed_lora import (
    check_index,
    choose,
    decide,
    glance,
    learns,
    pack_projections,
    routed_lora,
    run_forward,
)
from ...kernels.routed_lora import composite
from ...kernels.routed_lora.algebra import Dropout, Projection
from ...library import autocast_is_on, forward_mode_is_on, refuse_forward_mode, without_autocast
from ...reference import routed_lora as reference
from ...reference.dropout_mask import kept_value
from .arguments import DTYPES, check_dropout, check_projection, check_x, dropout_tensors, is_plain_layer, scaling_tensor
from .function import PlainLayerFunction, RoutedLoRAEagerFunction, RoutedLoRAFunction, is_plain

_LARGE = 1e30  # fp32 holds it, and what dropout makes of it


class RoutedLoRA(NamedTuple):
    """One projection of a group; fields as the arguments of :func:`routed_lora_linear`."""

    weight: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    routing: Tensor | None = None
    bias: Tensor | None = None
    frozen_routing: Tensor | None = None
    routing_index: Tensor | None = None
    gate: Tensor | None = None
    scaling: float | Tensor = 1.0
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None


def run(
    x: Tensor, adapters: list[RoutedLoRA], base_output: Tensor | None, training: bool, backend: str, prefix: str = ""
) -> Sequence[Tensor]:
    check_training(training)
    x, projections = prepare(x, adapters, base_output, prefix)
    # Under a compiler the operator chooses when it runs: a choice by M would compile a graph for each outcome.
    compiling = torch.compiler.is_compiling()
    late = compiling and backend not in ("reference", "composite")
    chosen = backend
    if late:
        check_backend(backend, "composite")
    elif backend != "auto":  # one that cannot run says so before a seed is drawn
        chosen = choose(x, projections, backend).backend
    projections = [draw(j, a, training, x) for j, a in zip(projections, adapters, strict=True)]
    if backend == "auto" and not late:  # tables tell calls that drop from those that do not
        chosen = decide(x, projections)
    if chosen == "composite":
        return [_composite(x, j, a, compiling) for j, a in zip(projections, adapters, strict=True)]
    if chosen == "reference":
        return [_reference(x, a, j) for a, j in zip(adapters, projections, strict=True)]
    tensors, given = pack_projections(projections)
    refuse_forward_mode("routed_lora", (x, *tensors))
    if compiling:
        # The operator has the gradients of the Function. Dynamo traces no Function that gets a tensor twice (a group
        # with one gate), nor one with *tensors where nothing learns.
        return routed_lora(x, tensors, given, chosen)[: len(projections)]
    if is_plain(x, tensors):
        if not learns(x, tensors):
            return run_forward(x, projections, chosen)[: len(projections)]
        return RoutedLoRAEagerFunction.apply(x, projections, tuple(given), chosen, *tensors)
    return RoutedLoRAFunction.apply(x, tuple(given), chosen, *tensors)[: len(projections)]


def run_plain(
    x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any, scaling: Any, dropout_p: Any, training: Any
) -> Tensor | None:
    """y of a plain layer that is seen at a glance to be right and small, as :func:`run` would compute it, which takes
    longer to find out than such a layer to compute; None for every other call."""
    if (
        torch.compiler.is_compiling()
        or not (type(scaling) is type(dropout_p) is float and abs(scaling) < _LARGE and 0 <= dropout_p <= 1)
        or type(training) is not bool
        or not isinstance(x, Tensor)
        or x.dtype not in DTYPES
        or x.layout is not torch.strided
        or not is_plain_layer(x, weight, lora_A, lora_B, bias)
        or autocast_is_on(x)
    ):
        return None
    tensors = (weight, lora_A, lora_B) if bias is None else (weight, lora_A, lora_B, bias)
    learning = learns(x, tensors)
    chosen = glance(x, weight, lora_A, lora_B, bias, learning)
    composed = chosen == "composite"
    if not composed and (not chosen or forward_mode_is_on() or not is_plain(x, tensors)):
        return None
    seed, threshold = dropout_tensors(dropout_p, None, training, x)
    if composed:
        scaling = scaling * _kept_value(seed, dropout_p)
        return composite.forward(x, weight, lora_A, lora_B, bias, None, scaling, seed, threshold)
    scaling = scaling_tensor(scaling, x)
    j = Projection(weight, lora_A, lora_B, None, None, None, None, bias, None, scaling, seed, threshold)
    if learning:
        return PlainLayerFunction.apply(x, j, weight, lora_A, lora_B, bias)
    return run_forward(x, [j], chosen)[0]


def _composite(x: Tensor, j: Projection, adapter: RoutedLoRA, compiling: bool) -> Tensor:
    scaling: float | Tensor = j.scaling
    if not compiling:
        if not isinstance(adapter.scaling, Tensor):  # a number, which ATen can take as one
            scaling = float(adapter.scaling)
        scaling = scaling * _kept_value(j.seed, adapter.dropout_p)
    elif j.seed is not None and j.threshold is not None:
        scaling = scaling * Dropout(j.seed, j.threshold).kept_value(x.dtype)
    return composite.forward(x, j.weight, j.lora_A, j.lora_B, j.bias, j.base_output, scaling, j.seed, j.threshold)


def _kept_value(seed: Tensor | None, dropout_p: float) -> float:
    """As ``Dropout.kept_value``, a number."""
    return 1.0 if seed is None else kept_value(round(65536 * dropout_p))


def check_training(training: Any) -> None:
    if not isinstance(training, bool):
        raise TypeError(f"training: got {type(training).__name__}, expected True or False")


def draw(j: Projection, adapter: RoutedLoRA, training: bool, x: Tensor) -> Projection:
    seed, threshold = dropout_tensors(adapter.dropout_p, adapter.dropout_seed, training, x)
    return j if seed is None else Projection(*j[:-2], seed, threshold)


def prepare(
    x: Tensor, adapters: list[RoutedLoRA], base_output: Tensor | None, prefix: str = ""
) -> tuple[Tensor, list[Projection]]:
    """x and the checked tensors of each projection, in the dtypes in which they run (those of autocast if it is on);
    the draws of dropout are still to be made."""
    check_x(x)
    autocast = autocast_is_on(x)
    x = _autocast(x) if autocast else x
    projections = []
    for i, a in enumerate(adapters):
        place = prefix and prefix.format(i)
        scaling = scaling_tensor(a.scaling, x, place)
        check_dropout(a.dropout_p, a.dropout_seed, x, place)
        weight = _autocast(a.weight) if autocast and a.weight is not None else a.weight
        options = (a.routing, a.frozen_routing, a.routing_index, a.gate, a.bias)
        j = Projection(weight, a.lora_A, a.lora_B, *options, base_output, scaling, None, None)
        check_projection(x, j, place)
        if j.routing_index is not None and not torch.compiler.is_compiling():  # then the operator does it
            check_index(j, place)
        projections.append(j)
    return x, projections


def _autocast(t: Tensor) -> Tensor:
    """What F.linear would compute with: autocast leaves fp64 alone."""
    return t if t.dtype == torch.float64 else t.to(torch.get_autocast_dtype(t.device.type))


def _reference(x: Tensor, adapter: RoutedLoRA, j: Projection) -> Tensor:
    with without_autocast(x):
        return reference.forward(
            x,
            j.weight,
            j.lora_A,
            j.lora_B,
            j.routing,
            j.bias,
            frozen_routing=j.frozen_routing,
            routing_index=j.routing_index,
            gate=j.gate,
            scaling=j.scaling,
            dropout_p=0.0 if j.seed is None else adapter.dropout_p,
            dropout_seed=j.seed,
            base_output=j.base_output,
        )
