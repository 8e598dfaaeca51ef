"""Integrity of memory: tensors unchanged, no uninitialised value read, no byte written out of bounds."""

from __future__ import annotations

import ctypes
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_MARGIN = 256  # elements on each side of a guarded tensor: several of the widest vector accesses


def _bytes_of(t: Tensor) -> bytes:
    """The whole storage of ``t``, what lies between its elements and around them included."""
    storage = t.detach().untyped_storage().cpu()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""


def _fingerprint(t: Tensor) -> tuple[Any, ...]:
    layout = (t.dtype, tuple(t.shape), t.stride(), t.storage_offset(), t.requires_grad)
    return (*layout, hashlib.blake2b(_bytes_of(t)).hexdigest())


@contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    """Raise AssertionError if a tensor's storage, shape, strides, dtype or requires_grad differ after the block."""
    before = [_fingerprint(t) for t in tensors]
    yield
    for i, (t, old) in enumerate(zip(tensors, before, strict=True)):
        new = _fingerprint(t)
        if new != old:
            what = "its contents" if new[:-1] == old[:-1] else f"{old[:-1]} to {new[:-1]}"
            raise AssertionError(f"tensor {i} of shape {tuple(t.shape)} was changed: {what}")


@dataclass
class Saved:
    """What autograd saved in the block: ``tensors`` as they were packed, one entry for each time one was saved."""

    tensors: list[Tensor] = field(default_factory=list)

    def holds(self, t: Tensor) -> bool:
        """Whether the storage of ``t`` is among what was saved."""
        return any(s.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for s in self.tensors if s.numel())

    @property
    def numel(self) -> list[int]:
        return [t.numel() for t in self.tensors]


@contextmanager
def saved_tensors() -> Iterator[Saved]:
    """Record what autograd saves in the block. When backward, also after the block, reads a saved tensor whose bytes
    have changed since it was saved, it raises AssertionError."""
    saved = Saved()

    def pack(t: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        kept = t.detach()
        saved.tensors.append(kept)
        return kept, _fingerprint(kept)

    def unpack(packed: tuple[Tensor, tuple[Any, ...]]) -> Tensor:
        t, before = packed
        if _fingerprint(t) != before:
            raise AssertionError(f"a saved tensor of shape {tuple(t.shape)} was changed before backward read it")
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield saved


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill memory that comes uninitialised from torch (empty, new_empty, empty_like, empty_strided, resize_), in Python
    and in C++, inside operators too, with NaN, or with the largest integer. Uses torch's deterministic mode, so
    operations that have a deterministic variant run that one."""
    deterministic: Any = torch.utils.deterministic  # its attribute is a property that no type checker sees
    filled = deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Dd]eterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned_only)
        deterministic.fill_uninitialized_memory = filled


class _Buffer:
    """A tensor in the middle of a buffer of random bytes."""

    def __init__(self, like: Tensor, offset: int = 0) -> None:
        extent = sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) + 1 if like.numel() else 0
        size = like.element_size()
        self.first, self.last = (_MARGIN + offset) * size, (_MARGIN + offset + extent) * size
        generator = torch.Generator().manual_seed(self.last)
        noise = torch.randint(256, (self.last + _MARGIN * size,), dtype=torch.uint8, generator=generator)
        self.bytes = noise.to(like.device)
        self.before = self.bytes.clone()
        self.tensor = self.bytes.view(like.dtype).as_strided(like.shape, like.stride(), _MARGIN + offset)

    def check(self) -> None:
        for part, side in ((slice(0, self.first), "before"), (slice(self.last, None), "after")):
            changed = (self.bytes[part] != self.before[part]).nonzero().flatten()
            if len(changed):
                raise AssertionError(
                    f"{len(changed)} bytes were written {side} a tensor of shape {tuple(self.tensor.shape)}, "
                    f"the first {int(changed[0])} bytes from the start of that margin"
                )


@contextmanager
def guarded(t: Tensor, offset: int = 0) -> Iterator[Tensor]:
    """A copy of ``t``, same strides, between margins of random bytes; AssertionError if they differ after the block.

    offset: elements by which the copy is moved, so that 1 gives a base pointer aligned to one element only.
    """
    buffer = _Buffer(t.detach(), offset)
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())
    buffer.tensor[once].copy_(t.detach()[once])
    yield buffer.tensor.requires_grad_(t.requires_grad)
    buffer.check()


_FACTORIES = [(torch, name) for name in ("empty", "empty_like", "empty_strided", "zeros", "zeros_like")] + [
    (torch.Tensor, name) for name in ("new_empty", "new_empty_strided", "new_zeros")
]


@contextmanager
def guarded_outputs() -> Iterator[list[Tensor]]:
    """Put a guard as in :func:`guarded` around every tensor that Python code allocates in the block (an operator's
    outputs and scratch, not what ATen allocates for itself); empty ones hold random bytes. Yields those tensors.
    AssertionError if a margin differs after the block. Not for ``torch.compile``."""
    buffers: list[_Buffer] = []
    tensors: list[Tensor] = []
    with ExitStack() as stack:
        for owner, name in _FACTORIES:
            guard = _guarding(getattr(owner, name), "zeros" in name, buffers, tensors)
            stack.enter_context(mock.patch.object(owner, name, guard))
        yield tensors
    for buffer in buffers:
        buffer.check()


def _guarding(
    factory: Callable[..., Tensor], zeros: bool, buffers: list[_Buffer], tensors: list[Tensor]
) -> Callable[..., Tensor]:
    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        plain = factory(*args, **kwargs)
        if plain.device.type == "meta" or plain.numel() == 0:
            return plain
        buffer = _Buffer(plain.detach())
        if zeros:
            buffer.tensor.zero_()
        buffers.append(buffer)
        tensors.append(buffer.tensor)
        return buffer.tensor.requires_grad_(plain.requires_grad)

    return allocate
