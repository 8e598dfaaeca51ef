"""The ``torch.autograd.Function`` of rank-1 experts, and the gradients of their operators."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch.choice import Choice
from ...dispatch.rank1_experts import (
    rank1_experts,
    rank1_experts_backward,
    rank1_experts_gather_backward,
    run_backward,
    run_forward,
)
from ...kernels.rank1_experts.algebra import Needs
from ...library import LIBRARY, FirstOrderBackward, FirstOrderReverse, below_autograd

_UNSUPPORTED = (
    "rank1_experts: {} is not supported by the operators; leading dimensions do what vmap would, and "
    "backend='reference' is plain PyTorch that can be differentiated any number of times"
)


class Rank1ExpertsFunction(FirstOrderReverse):
    """The arguments of the operator → (y, p); see ``dispatch.rank1_experts``.

    Saved: both pools, indices, gates, scaling; x if experts_A learns; p [M, k] if a gradient reads it. No chosen row.
    """

    UNSUPPORTED = _UNSUPPORTED

    @staticmethod
    def forward(
        x: Tensor,
        experts_A: Tensor,
        experts_B: Tensor,
        indices: Tensor,
        gates: Tensor | None,
        scaling: Tensor,
        base_output: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        tensors = (x, experts_A, experts_B, indices, gates, scaling, base_output)
        return tuple(below_autograd(rank1_experts, *tensors, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs[:6], output[1], ctx.needs_input_grad[:7], inputs[7], None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
        return *_gradients(ctx, dy), None


class Rank1ExpertsEagerFunction(torch.autograd.Function):
    """The same for plain tensors that nobody traces, past the dispatcher, which costs more than a few experts."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        experts_A: Tensor,
        experts_B: Tensor,
        indices: Tensor,
        gates: Tensor | None,
        scaling: Tensor,
        base_output: Tensor | None,
        backend: str,
        choice: Choice,
    ) -> Tensor:
        tensors = (x, experts_A, experts_B, indices, gates, scaling)
        y, p = run_forward(*tensors, base_output, choice)
        _save(ctx, tensors, p, ctx.needs_input_grad[:7], backend, choice)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        return *_gradients(ctx, dy), None, None


class Rank1ExpertsBackwardFunction(FirstOrderBackward):
    UNSUPPORTED = _UNSUPPORTED

    @staticmethod
    def forward(rest: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(below_autograd(rank1_experts_backward, *tensors, *rest))


# Function.apply binds defaults through inspect.signature, 20 µs a call where the signature is not at hand.
for _function in (Rank1ExpertsFunction, Rank1ExpertsBackwardFunction):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]


def _save(
    ctx: Any, tensors: Sequence[Any], p: Tensor, needed: Sequence[bool], backend: str, choice: Choice | None
) -> None:
    """Save the least that backward reads; with a choice backward, too, calls what the operator calls."""
    x, experts_A, experts_B, indices, gates, scaling = tensors
    need = Needs(*needed[:3], *needed[4:6])
    ctx.set_materialize_grads(False)
    if choice is None:  # then p is an output
        ctx.mark_non_differentiable(p)
    ctx.need, ctx.need_base, ctx.dtype, ctx.backend, ctx.choice = need, needed[6], x.dtype, backend, choice
    kept_x, kept_p = x if need.experts_A else None, p if need.p else None
    ctx.save_for_backward(kept_x, experts_A, experts_B, indices, gates, scaling, kept_p)


def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """A gradient or None for each tensor from x to base_output."""
    need: Needs = ctx.need
    if dy is None:
        return (None,) * 7
    saved = ctx.saved_tensors
    tensors = (dy, *saved)
    out: Sequence[Tensor | None] = (None,) * len(need)
    if any(need):
        if torch.is_grad_enabled():
            out = Rank1ExpertsBackwardFunction.apply((ctx.dtype, list(need), ctx.backend), *tensors)
        elif ctx.choice is not None and not torch.compiler.is_compiling():
            x, experts_A, experts_B, indices, gates, scaling, p = saved
            out = run_backward(dy, x, experts_A, experts_B, indices, gates, scaling, p, ctx.dtype, need, ctx.choice)
        else:
            out = below_autograd(rank1_experts_backward, *tensors, ctx.dtype, list(need), ctx.backend)
    dx, dA, dB, dgates, dscaling = (g if wanted else None for g, wanted in zip(out, need, strict=True))
    return dx, dA, dB, None, dgates, dscaling, dy if ctx.need_base else None


def _register() -> None:
    """Give the operators, called directly, the gradients of the Function."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        needed = [t is not None and t.requires_grad for t in inputs[:7]]
        _save(ctx, inputs[:6], output[1], needed, inputs[7], None)

    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
        return *_gradients(ctx, dy), None

    def setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        experts, _, gates = inputs
        ctx.needs = [experts.requires_grad, gates is not None and gates.requires_grad]
        ctx.save_for_backward(*inputs)

    def backward_of_gather(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        found = rank1_experts_gather_backward(d, *ctx.saved_tensors, ctx.needs)
        dexperts, dgates = (g if need else None for g, need in zip(found, ctx.needs, strict=True))
        return dexperts, None, dgates

    def backward_again(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return Rank1ExpertsBackwardFunction.backward(ctx, *grads)

    def register(name: str, *args: Any, **kwargs: Any) -> None:
        torch.library.register_autograd(f"clora_kernels::{name}", *args, **kwargs, lib=LIBRARY)

    register("rank1_experts", backward, setup_context=setup_context)
    register("rank1_experts_backward", backward_again)
    register("rank1_experts_gather", backward_of_gather, setup_context=setup_gather)
    register("rank1_experts_gather_backward", backward_again)


_register()
