"""Tensors of which each rank may hold a part: DTensors, as FSDP2 and plans of tensor parallel make them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(t: Any) -> bool:
    """Whether ``t`` is a DTensor, of which each rank may hold a part."""
    return hasattr(t, "device_mesh")


def gathered(t: Any) -> Tensor:
    """All of a tensor, of which each rank may hold a part: whoever asks, all ranks have to."""
    return t.full_tensor() if is_sharded(t) else t


def write(into: Any, value: Tensor) -> None:
    """Copy all of ``value`` into a tensor of the same shape; of a sharded one each rank takes its part."""
    if is_sharded(into) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        # src_data_rank=None: every rank has the whole and cuts its own part, where the default would wait for rank 0.
        value = distribute_tensor(value.to(into.device), into.device_mesh, into.placements, src_data_rank=None)
    into.copy_(value)
