"""The ``torch.autograd.Function`` of routed LoRA, shared by a layer, a group and the adapter alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dispatch.routed_lora import routed_lora, routed_lora_backward, unpack_projections
from ...kernels.routed_lora.algebra import Needs, Projection
from ...library import LIBRARY, below_autograd


class RoutedLoRAFunction(torch.autograd.Function):
    """(x, given, backend, *tensors) → (y of each projection, p of each projection); see ``dispatch.routed_lora``.

    Saved: the tensors; x if a lora_A or a weight learns; p [M, r] if a gradient reads it. Nothing of size M×N, no mask.
    """

    @staticmethod
    def forward(x: Tensor, given: tuple[bool, ...], backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(below_autograd(routed_lora, x, tensors, given, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, given, backend, *tensors = inputs
        _save(ctx, x, tensors, given, backend, output, ctx.needs_input_grad[0], ctx.needs_input_grad[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dx, dtensors = _gradients(ctx, grads)
        return dx, None, None, *dtensors


class RoutedLoRABackwardFunction(torch.autograd.Function):
    """The backward operator as a node of its own, so that a second differentiation fails and says why."""

    @staticmethod
    def forward(call: _BackwardCall, *flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(below_autograd(routed_lora_backward, *call.arguments(flat)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to save: ``backward`` only raises."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise RuntimeError(
            "routed_lora: double backward is not supported by the fused backward; pass backend='reference', which "
            "autograd differentiates any number of times"
        )


class _BackwardCall(NamedTuple):
    """The arguments of the backward operator that are no tensors, and how its tensors lie in one flat list."""

    outputs: int
    has_x: bool
    dtype: torch.dtype
    need_x: bool
    needs: tuple[bool, ...]
    given: tuple[bool, ...]
    backend: str

    def arguments(self, flat: Sequence[Tensor]) -> tuple[Any, ...]:
        n = self.outputs
        dys, ps, rest = flat[:n], flat[n : 2 * n], flat[2 * n :]
        x, tensors = (rest[0], rest[1:]) if self.has_x else (None, rest)
        return dys, x, ps, self.dtype, self.need_x, self.needs, tensors, self.given, self.backend


def _save(
    ctx: Any,
    x: Tensor,
    tensors: Sequence[Tensor],
    given: Sequence[bool],
    backend: str,
    output: Sequence[Tensor],
    need_x: bool,
    need_tensors: Sequence[bool],
) -> None:
    """Save the least that backward reads."""
    outputs = len(given) // len(Projection._fields)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[outputs:])
    remaining = iter(need_tensors)
    wanted = [Projection(*(there and next(remaining) for there in row)) for row in _rows(given)]
    ctx.needs = [Needs(*(getattr(w, name) for name in Needs._fields)) for w in wanted]
    ctx.need_base_output = [w.base_output for w in wanted]
    ctx.need_x, ctx.dtype, ctx.given, ctx.backend = need_x, x.dtype, tuple(given), backend
    ctx.has_x = any(need.weight or need.lora_A for need in ctx.needs)
    ps = [p if need.of_p else p.new_empty(0) for p, need in zip(output[outputs:], ctx.needs, strict=True)]
    ctx.save_for_backward(*ps, *([x] if ctx.has_x else []), *tensors)


def _rows(given: Sequence[bool]) -> list[Sequence[bool]]:
    size = len(Projection._fields)
    return [given[i : i + size] for i in range(0, len(given), size)]


def _gradients(
    ctx: Any, grads: Sequence[Tensor | None], apply: Callable[..., Any] | None = None
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, and a gradient or None for each tensor that was given. Projections whose output was not used are left out."""
    n = len(ctx.needs)
    ps, rest = ctx.saved_tensors[:n], list(ctx.saved_tensors[n:])
    x = rest.pop(0) if ctx.has_x else None
    used = [i for i in range(n) if grads[i] is not None]
    rows, projections = _rows(ctx.given), unpack_projections(rest, ctx.given)
    tensors = [t for i in used for t in projections[i] if t is not None]
    call = _BackwardCall(
        outputs=len(used),
        has_x=ctx.has_x,
        dtype=ctx.dtype,
        need_x=ctx.need_x,
        needs=tuple(need for i in used for need in ctx.needs[i]),
        given=tuple(there for i in used for there in rows[i]),
        backend=ctx.backend,
    )
    flat = [grads[i] for i in used] + [ps[i] for i in used] + ([x] if ctx.has_x else []) + tensors
    out = (apply or RoutedLoRABackwardFunction.apply)(call, *flat)
    dx = out[0] if ctx.need_x else None
    dtensors: list[Tensor | None] = []
    for i, j in enumerate(projections):
        dfields = Projection(*[None] * len(Projection._fields))
        if i in used:
            of_one = out[1 + used.index(i) * len(Needs._fields) :]
            wanted = {name: g for name, g, need in zip(Needs._fields, of_one, ctx.needs[i], strict=False) if need}
            dfields = dfields._replace(**wanted, base_output=grads[i] if ctx.need_base_output[i] else None)
        dtensors += [g for g, t in zip(dfields, j, strict=True) if t is not None]
    return dx, dtensors


def _register() -> None:
    """Give the operators, called directly, the gradients of the Function."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        x, tensors, given, backend = inputs
        _save(ctx, x, tensors, given, backend, output, x.requires_grad, [t.requires_grad for t in tensors])

    def backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        dx, dtensors = _gradients(ctx, grads)
        return dx, dtensors, None, None

    def backward_again(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return RoutedLoRABackwardFunction.backward(ctx, *grads)

    torch.library.register_autograd("clora_kernels::routed_lora", backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd("clora_kernels::routed_lora_backward", backward_again, lib=LIBRARY)


_register()
