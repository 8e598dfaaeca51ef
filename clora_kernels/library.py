"""The namespace ``torch.ops.clora_kernels`` and the one way in which operators enter it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
"""Tensors that hold values, and that no subclass wants to see operators of."""

LIBRARY = torch.library.Library("clora_kernels", "FRAGMENT")


def define_operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``schema`` with one implementation for every device and its fake; returns the overload.

    ``Library.define`` costs a third of ``torch.library.custom_op`` a call.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"clora_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.clora_kernels, name).default


def autocast_is_on(t: Tensor) -> bool:
    """Whether autocast is enabled for the device of ``t``; False for devices that have none (meta)."""
    if not torch._C._is_any_autocast_enabled():  # as nearly always, for a third of the time
        return False
    device_type = t.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """The dtypes are decided before an operator is called; leaving autocast costs 4 µs, so only where it is on."""
    if autocast_is_on(t):
        return torch.autocast(t.device.type, enabled=False)
    return nullcontext()


def forward_mode_is_on() -> bool:
    return forward_ad._current_level >= 0


def refuse_forward_mode(operation: str, tensors: Iterable[Tensor | None]) -> None:
    """RuntimeError where one of ``tensors`` carries a tangent, which the operators would lose."""
    if not forward_mode_is_on():  # as nearly always
        return
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise RuntimeError(
                f"{operation}: forward mode (torch.func.jvp, torch.autograd.forward_ad) is not supported by the "
                "operators; pass backend='reference', plain PyTorch that every transform can go through"
            )


def refuse_forward_mode_below_autograd(operation: str, tensors: Iterable[Tensor | None]) -> None:
    """The same inside an operator, which alone sees the tangents of what a compiled graph was called with."""
    if not forward_mode_is_on():
        return
    # to look at a tangent makes a view of it, which a key that is left out below autograd must see
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.ADInplaceOrView)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        refuse_forward_mode(operation, tensors)


class FirstOrderReverse(torch.autograd.Function):
    """Says in words that help what the operators do not do: ``UNSUPPORTED``, with a place for that. Forward mode is
    refused before a Function is asked: Dynamo traces none that defines ``jvp``."""

    UNSUPPORTED: str

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:
        raise RuntimeError(cls.UNSUPPORTED.format("torch.func.vmap (nor jacrev, jacfwd or hessian, which use it)"))


class FirstOrderBackward(FirstOrderReverse):
    """A backward operator as a node of its own, so that a second differentiation fails and says why."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to save: ``backward`` only raises."""

    @classmethod
    def backward(cls, ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(cls.UNSUPPORTED.format("double backward"))


def below_autograd(operator: Any, *args: Any) -> Any:
    """Call an operator from inside an ``autograd.Function``, whose backward it shares: its own autograd is stepped
    over."""
    if torch.compiler.is_compiling():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)
