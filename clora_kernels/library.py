"""The namespace ``torch.ops.clora_kernels`` and the one way in which operators enter it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


def below_autograd(operator: Any, *args: Any) -> Any:
    """Call an operator from inside an ``autograd.Function``, whose backward it shares: its own autograd is stepped
    over."""
    if torch.compiler.is_compiling():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)
