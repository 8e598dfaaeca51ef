"""The CUDA kernels of rank-1 experts on the GPU that ``tests/emulation`` makes of a CPU, as the compiled operators."""

from __future__ import annotations

import ctypes
from pathlib import Path
from random import Random

import torch
from torch import Tensor


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("bytes", ctypes.c_int),
        ("half", ctypes.c_bool),
    )


class Call(ctypes.Structure):
    _fields_ = (
        ("indices", ctypes.c_void_p),
        ("wide", ctypes.c_bool),
        ("experts", ctypes.c_int),
        ("k", ctypes.c_int),
        ("groups", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("multiprocessors", ctypes.c_int),
        ("l2_bytes", ctypes.c_int),
    )


def _matrix(t: Tensor) -> object:
    return ctypes.byref(
        Matrix(t.data_ptr(), *t.shape, t.stride(0), t.element_size(), t.dtype == torch.float16)
    )  # fmt: skip


def _pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


class Emulated:
    """``ways`` holds how kernels went, as each tells it in ``tests/emulation``."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.random = folder, seed, Random(seed)
        self.libraries: dict[str, ctypes.CDLL] = {}
        self.ways: dict[str, set[int]] = {"shrink": set(), "expand": set(), "reduce": set()}

    def _library(self, name: str) -> ctypes.CDLL:
        if name not in self.libraries:
            self.libraries[name] = ctypes.CDLL(str(self.folder / f"{name}.so"))
            self.libraries[name].seed(self.seed)
        return self.libraries[name]

    def _call(self, indices: Tensor, experts: int, rows: int) -> object:
        """On GPUs of any size: it decides what is shared among warps and what is cut into chunks."""
        (groups, k), wide = indices.shape, indices.dtype == torch.int64
        multiprocessors, l2_bytes = self.random.choice([1, 4, 132]), self.random.choice([1, 20000, 50 << 20])
        length = rows // groups if groups else 0
        return ctypes.byref(Call(indices.data_ptr(), wide, experts, k, groups, length, multiprocessors, l2_bytes))

    def shrink(self, big: Tensor, experts: Tensor, indices: Tensor) -> Tensor:
        out = torch.full((len(big), indices.shape[1]), float("nan"))
        if out.numel():
            call, matrices = self._call(indices, len(experts), len(big)), (_matrix(big), _matrix(experts))
            self.ways["shrink"].add(self._library("shrink").shrink(*matrices, call, _pointer(out)))
        return out

    def expand_(self, y: Tensor, small: Tensor, experts: Tensor, indices: Tensor, base: Tensor | None) -> None:
        if y.numel():
            call, under = self._call(indices, len(experts), len(y)), None if base is None else _matrix(base)
            expand, matrices = self._library("expand").expand, (_matrix(y), _pointer(small), _matrix(experts))
            self.ways["expand"].add(expand(*matrices, call, under))

    def order(self, indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        numbers = [torch.empty(size, dtype=torch.int32) for size in (indices.numel(), indices.numel(), experts + 1)]
        keys, positions, starts = numbers
        library, call = self._library("reduce"), self._call(indices, experts, len(indices))
        bits = library.keys(call, _pointer(keys), _pointer(positions))
        assert ((keys >> bits) == 0).all(), f"keys have more than the {bits} bits that a sort looks at"
        keys, order = keys.sort(stable=True)
        library.starts(call, _pointer(keys), _pointer(starts))
        return positions[order], starts

    def reduce_(self, out: Tensor, small: Tensor, big: Tensor, indices: Tensor, order: Tensor, starts: Tensor) -> None:
        if out.numel():
            call, lists = self._call(indices, len(out), len(big)), (_pointer(order), _pointer(starts))
            reduce, matrices = self._library("reduce").reduce, (_matrix(out), _pointer(small), _matrix(big))
            self.ways["reduce"].add(reduce(*matrices, call, *lists))
