"""Indices into a bank or a pool: checked where their values can be read without waiting, else held inside."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..library import PLAIN_TYPES


def check_range(name: str, index: Tensor, size: int) -> None:
    """IndexError for an ``index`` outside 0 .. size − 1, with its place and value. On a GPU this would sync, so it is
    done in checked mode alone. An index without values (fake tensors, tracers) is checked when the operator runs."""
    while torch._C._functorch.is_functorch_wrapped_tensor(index):  # vmap batches no value that decides, and needs none
        index = torch._C._functorch.get_unwrapped(index)
    if type(index) not in PLAIN_TYPES or not index.numel() or torch._C._len_torch_dispatch_stack():
        return
    if not index.is_cpu and os.environ.get("CLORA_CHECK_INDICES") != "1":
        return
    least, most = torch.aminmax(index)
    if least.item() >= 0 and most.item() < size:
        return
    position = ((index < 0) | (index >= size)).nonzero()[0].tolist()
    raise IndexError(f"{name}{position}: got {int(index[tuple(position)])}, expected 0 <= index < {size}")


def bounded(index: Tensor, size: int) -> Tensor:
    """An index that is not checked must at least not read outside."""
    return index if index.is_cpu else index.clamp(0, size - 1)
