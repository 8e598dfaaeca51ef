"""The ``torch.autograd.Function`` of routed LoRA, shared by a layer, a group and the adapter alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...dispatch.routed_lora import (
    pack_projections,
    routed_lora,
    routed_lora_backward,
    run_backward,
    run_forward,
    unpack_projections,
)
from ...kernels.routed_lora.algebra import Needs, Projection
from ...library import LIBRARY, PLAIN_TYPES, FirstOrderBackward, FirstOrderReverse, below_autograd

_UNSUPPORTED = (
    "routed_lora: {} is not supported by the fused operators; pass backend='reference', plain PyTorch that "
    "every transform and any number of differentiations can go through"
)


class RoutedLoRAFunction(FirstOrderReverse):
    """(x, given, backend, *tensors) → (y of each projection, what each keeps); see ``dispatch.routed_lora``.

    Saved: the tensors; x if a lora_A or a weight learns; q or p [M, r] if a gradient reads it. Nothing of size M×N, no
    mask.
    """

    UNSUPPORTED = _UNSUPPORTED

    @staticmethod
    def forward(x: Tensor, given: tuple[bool, ...], backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(below_autograd(routed_lora, x, tensors, given, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, given, backend, *tensors = inputs
        needed = ctx.needs_input_grad
        _save(ctx, x, tensors, given, backend, output, needed[:1] + needed[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dx, dtensors = _gradients(ctx, grads)
        return dx, None, None, *dtensors


class RoutedLoRAEagerFunction(torch.autograd.Function):
    """The same for plain tensors that nobody traces: it calls what the operators call. The dispatcher and a
    Function that transforms can read costs 200 µs a step, more than a small layer takes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: list[Projection], given: tuple[bool, ...], backend: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        output = run_forward(x, projections, backend)
        needed = ctx.needs_input_grad
        _save(ctx, x, tensors, given, backend, output, needed[:1] + needed[4:], direct=True)
        return tuple(output[: len(projections)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dx, dtensors = _gradients(ctx, grads)
        return dx, None, None, None, *dtensors


class PlainLayerFunction(torch.autograd.Function):
    """The same of one plain layer on backend "native", without what a group and options need: 40 µs a step less."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, j: Projection, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
    ) -> Tensor:
        y, q = run_forward(x, [j], "native")
        ctx.need_x, _, W, A, B, b = ctx.needs_input_grad
        ctx.need, ctx.dtype = Needs(W, A, B, False, False, b, False), x.dtype
        ctx.set_materialize_grads(False)
        read = (x if W or A else None, q if B else None)
        ctx.save_for_backward(*read, weight, lora_A, lora_B, bias, j.scaling, j.seed, j.threshold)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        x, q, weight, lora_A, lora_B, bias, *rest = ctx.saved_tensors
        j = Projection(weight, lora_A, lora_B, None, None, None, None, bias, None, *rest)
        kept = [dy.new_empty(0) if q is None else q]
        if torch.is_grad_enabled():
            tensors, given = pack_projections([j])
            lengths, has_x = (1, int(x is not None)), () if x is None else (x,)
            how = (ctx.dtype, ctx.need_x, tuple(ctx.need), given, "native")
            grads = RoutedLoRABackwardFunction.apply(lengths, how, dy, *has_x, *kept, *tensors)
        else:
            grads = run_backward([dy], x, kept, ctx.dtype, ctx.need_x, [ctx.need], [j], "native")
        dx, dW, dA, dB, _, _, dbias, _ = grads
        return dx, None, dW, dA, dB, None if bias is None else dbias


def is_plain(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether no transform, mode, tracer or tensor subclass wants to see the operators of this call."""
    return (
        not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._get_tracing_state()
        and type(x) in PLAIN_TYPES
        and PLAIN_TYPES.issuperset(map(type, tensors))
    )


class RoutedLoRABackwardFunction(FirstOrderBackward):
    UNSUPPORTED = _UNSUPPORTED

    @staticmethod
    def forward(lengths: tuple[int, int], rest: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(below_autograd(routed_lora_backward, *_operator_arguments(lengths, rest, tensors)))


# Function.apply binds defaults through inspect.signature, 20 µs a call where the signature is not at hand.
for _function in (RoutedLoRAFunction, RoutedLoRABackwardFunction):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]


def _operator_arguments(lengths: tuple[int, int], rest: tuple[Any, ...], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The backward operator's arguments, from dys, x where it was saved, what forward kept and the tensors in a row."""
    n, has_x = lengths
    dys, x, kept = tensors[:n], tensors[n] if has_x else None, tensors[n + has_x : 2 * n + has_x]
    dtype, need_x, needs, given, backend = rest
    return dys, x, kept, dtype, need_x, needs, tensors[2 * n + has_x :], given, backend


@dataclass(frozen=True)
class _Plan:
    """What a set of given and of needed tensors means for backward.

    ``sources``: for each given tensor the place of its gradient among the operator's outputs, or −1 − j for base_output
    of projection j, whose gradient is dy, or None. ``base_outputs``: their places among the given tensors.
    """

    projections: int
    need_x: bool
    needs: tuple[Needs, ...]
    flat_needs: tuple[bool, ...]
    has_x: bool
    sources: tuple[int | None, ...]
    base_outputs: tuple[int, ...]


@lru_cache(maxsize=1024)
def _plan(given: tuple[bool, ...], needed: tuple[bool, ...]) -> _Plan:
    """``needed``: whether x, and each given tensor, needs a gradient."""
    size, remaining = len(Projection._fields), iter(needed[1:])
    rows = [given[i : i + size] for i in range(0, len(given), size)]
    wanted = [{f: there and next(remaining) for f, there in zip(Projection._fields, row, strict=True)} for row in rows]
    needs = tuple(Needs(*(w[name] for name in Needs._fields)) for w in wanted)
    sources: list[int | None] = []
    base_outputs = []
    for j, (row, w) in enumerate(zip(rows, wanted, strict=True)):
        for name, there in zip(Projection._fields, row, strict=True):
            if there and name == "base_output":
                base_outputs.append(len(sources))
                sources.append(-1 - j if w[name] else None)
            elif there:
                place = Needs._fields.index(name) if name in Needs._fields and w[name] else None
                sources.append(None if place is None else 1 + j * len(Needs._fields) + place)
    flat_needs = tuple(need for of_one in needs for need in of_one)
    has_x = any(n.weight or n.lora_A for n in needs)
    return _Plan(len(rows), needed[0], needs, flat_needs, has_x, tuple(sources), tuple(base_outputs))


def _save(
    ctx: Any,
    x: Tensor,
    tensors: Sequence[Tensor],
    given: Sequence[bool],
    backend: str,
    output: Sequence[Tensor],
    needed: tuple[bool, ...],
    direct: bool = False,
) -> None:
    """Save the least that backward reads; ``direct``: backward, too, calls what the operator calls."""
    given = tuple(given)
    plan = _plan(given, needed)
    n = plan.projections
    ctx.set_materialize_grads(False)
    if not direct:  # then what is kept is no output
        ctx.mark_non_differentiable(*output[n:])
    ctx.plan, ctx.given, ctx.backend, ctx.dtype, ctx.direct = plan, given, backend, x.dtype, direct
    ctx.output_shapes = [(y.shape, y.dtype) for y in output[:n]] if n > 1 else ()  # of one y its gradient tells
    of_forward = [t if need.of_forward else t.new_empty(0) for t, need in zip(output[n:], plan.needs, strict=True)]
    # of a base output backward reads nothing: an empty tensor keeps its place
    kept = [t.new_empty(0) if i in plan.base_outputs else t for i, t in enumerate(tensors)]
    ctx.save_for_backward(*([x] if plan.has_x else ()), *of_forward, *kept)


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, and a gradient or None for each tensor that was given."""
    plan: _Plan = ctx.plan
    if all(g is None for g in grads[: plan.projections]):
        return None, [None] * len(plan.sources)
    dys = _given_dys(grads[: plan.projections], ctx.output_shapes)
    lengths = (plan.projections, int(plan.has_x))
    rest = (ctx.dtype, plan.need_x, plan.flat_needs, ctx.given, ctx.backend)
    tensors = (*dys, *ctx.saved_tensors)
    out: Sequence[Tensor | None]
    if torch.is_grad_enabled():
        out = RoutedLoRABackwardFunction.apply(lengths, rest, *tensors)
    elif ctx.direct and not torch.compiler.is_compiling():
        dys, x, kept, *_, given_tensors, given, backend = _operator_arguments(lengths, rest, tensors)
        projections = unpack_projections(given_tensors, given)
        out = run_backward(dys, x, kept, ctx.dtype, plan.need_x, plan.needs, projections, backend)
    else:
        out = below_autograd(routed_lora_backward, *_operator_arguments(lengths, rest, tensors))
    dtensors = [None if i is None else out[i] if i >= 0 else dys[-1 - i] for i in plan.sources]
    return out[0] if plan.need_x else None, dtensors


def _given_dys(grads: Sequence[Tensor | None], shapes: Sequence[tuple[torch.Size, torch.dtype]]) -> Sequence[Tensor]:
    """Zeros for the outputs of a group that nothing used."""
    like = next(g for g in grads if g is not None)
    return [like.new_zeros(shapes[i][0], dtype=shapes[i][1]) if g is None else g for i, g in enumerate(grads)]


def _register() -> None:
    """Give the operators, called directly, the gradients of the Function."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        x, tensors, given, backend = inputs
        needed = tuple(t.requires_grad for t in (x, *tensors))
        _save(ctx, x, tensors, given, backend, output, needed)

    def backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        dx, dtensors = _gradients(ctx, grads)
        return dx, dtensors, None, None

    def backward_again(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return RoutedLoRABackwardFunction.backward(ctx, *grads)

    torch.library.register_autograd("clora_kernels::routed_lora", backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd("clora_kernels::routed_lora_backward", backward_again, lib=LIBRARY)


_register()
