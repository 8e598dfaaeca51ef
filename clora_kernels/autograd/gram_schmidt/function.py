"""The ``torch.autograd.Function`` of Gram-Schmidt, shared by one call and a list of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch.gram_schmidt import (
    gram_schmidt,
    gram_schmidt_backward,
    run_backward,
    run_forward,
    unpack_bases,
)
from ...library import LIBRARY, FirstOrderBackward, FirstOrderReverse, below_autograd

_UNSUPPORTED = (
    "gram_schmidt: {} is not supported by the operators; batch dimensions do what vmap would, and "
    "backend='reference' is plain PyTorch that can be differentiated any number of times"
)


class GramSchmidtFunction(FirstOrderReverse):
    """(given, rank_tol, deficient, backend, *V, *bases) → (*Q, *R, *rank); see ``dispatch.gram_schmidt``.

    Saved: V and the bases, which are inputs, Q and R, which are outputs. Nothing else.
    """

    UNSUPPORTED = _UNSUPPORTED

    @staticmethod
    def forward(
        given: tuple[bool, ...], rank_tol: float | None, deficient: str, backend: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n = len(given)
        return tuple(below_autograd(gram_schmidt, tensors[:n], tensors[n:], given, rank_tol, deficient, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        given, _, _, backend, *tensors = inputs
        _save(ctx, tensors, given, backend, output, ctx.needs_input_grad[4:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, None, None, *_gradients(ctx, grads)


class GramSchmidtEagerFunction(torch.autograd.Function):
    """The same for plain tensors that nobody traces, past the dispatcher, which costs more than a small matrix."""

    @staticmethod
    def forward(
        ctx: Any, given: tuple[bool, ...], rank_tol: float | None, deficient: str, backend: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n = len(given)
        output = run_forward(tensors[:n], unpack_bases(tensors[n:], given), rank_tol, deficient, backend)
        _save(ctx, tensors, given, backend, output, ctx.needs_input_grad[4:], direct=True)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, None, None, *_gradients(ctx, grads)


class GramSchmidtBackwardFunction(FirstOrderBackward):
    UNSUPPORTED = _UNSUPPORTED

    @staticmethod
    def forward(given: tuple[bool, ...], needs: tuple[bool, ...], backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(below_autograd(gram_schmidt_backward, *_operator_arguments(given, needs, backend, tensors)))


def _operator_arguments(
    given: Sequence[bool], needs: Sequence[bool], backend: str, tensors: Sequence[Tensor]
) -> tuple[Any, ...]:
    """The backward operator's arguments, from all dQ, all dR, V, the bases, Q and R in a row."""
    n, bases = len(given), sum(given)
    dQ, dR, V = tensors[:n], tensors[n : 2 * n], tensors[2 * n : 3 * n]
    rest = tensors[3 * n + bases :]
    return dQ, dR, V, tensors[3 * n : 3 * n + bases], given, rest[:n], rest[n:], needs, backend


def _save(
    ctx: Any,
    tensors: Sequence[Tensor],
    given: Sequence[bool],
    backend: str,
    output: Sequence[Tensor],
    needs: Sequence[bool],
    direct: bool = False,
) -> None:
    n = len(given)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2 * n :])
    ctx.given, ctx.needs, ctx.backend, ctx.direct = tuple(given), tuple(needs), backend, direct
    ctx.save_for_backward(*tensors, *output[: 2 * n])


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A gradient or None for each V and each basis that was given."""
    given, needs = ctx.given, ctx.needs
    n = len(given)
    saved = ctx.saved_tensors
    outputs = saved[len(needs) :]
    # an output that nothing used: zeros without memory
    given_grads = [o.new_zeros(()).expand(o.shape) if g is None else g for g, o in zip(grads, outputs, strict=False)]
    tensors = (*given_grads, *saved)
    if torch.is_grad_enabled():
        out = GramSchmidtBackwardFunction.apply(given, needs, ctx.backend, *tensors)
    elif ctx.direct and not torch.compiler.is_compiling():
        dQ, dR, V, against, _, Q, R, _, backend = _operator_arguments(given, needs, ctx.backend, tensors)
        need_P = iter(needs[n:])
        of_bases = [there and next(need_P) for there in given]
        dV, dP = run_backward(dQ, dR, V, unpack_bases(against, given), Q, R, needs[:n], of_bases, backend)
        out = dV + [g for g, there in zip(dP, given, strict=True) if there]
    else:
        out = below_autograd(gram_schmidt_backward, *_operator_arguments(given, needs, ctx.backend, tensors))
    return list(out)


def _register() -> None:
    """Give the operators, called directly, the gradients of the Function."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        V, against, given, _, _, backend = inputs
        _save(ctx, [*V, *against], given, backend, output, [t.requires_grad for t in (*V, *against)])

    def backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        n = len(ctx.given)
        found = _gradients(ctx, grads)
        return found[:n], found[n:], None, None, None, None

    def backward_again(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return GramSchmidtBackwardFunction.backward(ctx, *grads)

    torch.library.register_autograd("clora_kernels::gram_schmidt", backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd("clora_kernels::gram_schmidt_backward", backward_again, lib=LIBRARY)


_register()
