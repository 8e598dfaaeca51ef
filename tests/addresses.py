"""What a Triton kernel may touch, element by element, and tensors of whole numbers, whose sums are exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from clora_kernels.testing import guarded_outputs


@contextmanager
def only_elements_of(*tensors: Tensor | None) -> Iterator[list[Tensor]]:
    """AssertionError if a kernel in the block reads what is no element of ``tensors`` or of what the block allocates,
    or writes what is no element of the latter. What is masked and stands for nothing reads as NaN.

    Only the interpreter shows addresses; on a GPU margins are guarded alone.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    given = [t for t in tensors if t is not None and t.device.type == "cpu"]
    elements = cache(_elements)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self: Any, ptrs: Any, mask: Any, other: Any, *options: Any, **named: Any) -> Any:
        _check("reads", ptrs, mask, [*map(elements, [*given, *outputs])])
        found = load(self, ptrs, mask, other, *options, **named)
        if other is None and np.issubdtype(found.data.dtype, np.floating):
            found = TensorHandle(np.where(mask.data, found.data, np.nan).astype(found.data.dtype), found.dtype)
        return found

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *options: Any, **named: Any) -> Any:
        _check("writes", ptrs, mask, [*map(elements, outputs)])
        return store(self, ptrs, value, mask, *options, **named)

    with (
        guarded_outputs() as outputs,
        mock.patch.object(InterpreterBuilder, "create_masked_load", checked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", checked_store),
    ):
        yield outputs


def _check(does: str, ptrs: Any, mask: Any, allowed: list[np.ndarray]) -> None:
    touched = np.broadcast_to(ptrs.data, np.shape(mask.data))[mask.data].astype(np.int64)
    for elements in allowed:
        touched = touched[elements[np.minimum(np.searchsorted(elements, touched), len(elements) - 1)] != touched]
    if touched.size:
        raise AssertionError(f"a kernel {does} {touched.size} addresses that it must not, the first {touched[0]}")


def _elements(t: Tensor) -> np.ndarray:
    """The address of every element, in their order."""
    offsets = np.zeros((), np.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    return np.unique(t.data_ptr() + t.element_size() * offsets)


def whole(shape: tuple[int, ...], largest: int, device: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-largest, largest + 1, shape, device=device).to(dtype)
