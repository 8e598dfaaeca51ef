"""What the kernels and their launchers share: one matmul, the dropout mask, scalars, devices, declarations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import cdiv
from ..tiles import INTERPRETER, MOST_RANKS, ReduceTile, ShrinkTile, block_of_rank

# Read when kernels are decorated, as Triton itself reads it.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

SCRATCH_BYTES = 32 << 20
"""Most scratch of a sum that is split, in one launch."""

T = TypeVar("T")


@triton.jit
def widened(value):
    """``value`` in fp32. The interpreter converts subnormal bf16 wrongly, so there the bits are moved."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def number(value):
    """A number in fp32 that comes as it is, or by a pointer."""
    if value.dtype.is_ptr():
        value = tl.load(value)
    return widened(value)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in fp32. The interpreter multiplies the bit patterns of bf16, so there operands are converted first."""
    if INTERPRETED:
        a, b = widened(a), widened(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """``value`` in ``dtype``, to nearest even. The interpreter cuts off what bf16 cannot hold, so there the bits are
    rounded."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = widened(value).to(tl.uint32, bitcast=True)
        nearest = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif value.dtype == tl.float64 and dtype != tl.float64:
        return value.to(tl.float32).to(dtype)
    else:
        return value.to(dtype)


@triton.jit
def kept(seed, threshold, offs_m, first_column, columns, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """True where kept [BLOCK_M, BLOCK]: rows ``offs_m``, columns from ``first_column``, a multiple of 8, on; bit
    for bit ``reference.dropout_mask``. One Philox block serves eight elements."""
    groups = tl.cdiv(columns, 8)
    offs_g = first_column // 8 + tl.arange(0, BLOCK // 8)
    index = offs_m.to(tl.int64)[:, None] * groups + offs_g[None, :]  # [BLOCK_M, BLOCK / 8] int64
    low, high = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32)
    zero = low & 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_M, BLOCK / 8, 2, 2], in memory order w0 w1 w2 w3
    halves = tl.join((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)  # [.., 2, 2, 2], the low half first
    return tl.reshape(halves, (BLOCK_M, BLOCK))


@triton.jit
def load_threshold(threshold_ptr):
    """The threshold of a draw, 0 .. 65536."""
    return tl.load(threshold_ptr).to(tl.uint32)


@triton.jit
def kept_value(threshold_ptr):
    """What a kept element counts: 1 / (1 - threshold / 65536), 0 where everything drops."""
    threshold = load_threshold(threshold_ptr)
    of_kept = (65536 - tl.minimum(threshold, 65535)).to(tl.float32)
    return tl.where(threshold < 65536, tl.div_rn(tl.zeros_like(of_kept) + 65536.0, of_kept), 0.0)


@triton.jit
def load_tile(ptr, stride_row, stride_column, rows, columns, mask_rows, mask_columns):
    """[rows, columns] of a matrix, 0 where masked; addresses are int64."""
    offs = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    return tl.load(ptr + offs, mask=mask_rows[:, None] & mask_columns[None, :], other=0.0)


@triton.jit
def store_tile(ptr, stride_row, stride_column, rows, columns, mask_rows, mask_columns, value):
    """Write [rows, columns] of a matrix in its dtype, rounded once; addresses are int64."""
    offs = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    tl.store(ptr + offs, rounded(value, ptr.dtype.element_ty), mask=mask_rows[:, None] & mask_columns[None, :])


def chunks(items: Sequence[T], ranks: Sequence[int]) -> Iterator[tuple[Sequence[T], int]]:
    """Items that share one read of the big operand, with the block of their ranks; of 256 padded ranks at most."""
    if len(items) == 1:
        yield items, block_of_rank(ranks[0])
        return
    start = 0
    while start < len(items):
        stop = start + 1
        while stop < len(items):
            if block_of_rank(max(ranks[start : stop + 1])) * (stop + 1 - start) > MOST_RANKS:
                break
            stop += 1
        yield items[start:stop], block_of_rank(max(ranks[start:stop]))
        start = stop


def split(steps: int, blocks: int, part_bytes: int, tile: ShrinkTile | ReduceTile, t: Tensor) -> tuple[int, int]:
    """(steps of a part; number of parts) of a sum of ``steps`` steps by ``blocks`` blocks of programs: enough programs
    for the device of ``t``, but several steps a part, and parts within ``SCRATCH_BYTES``."""
    wanted = min(cdiv(tile.per_sm * programs(t), blocks), steps // tile.least_steps, tile.most_splits)
    per_part = max(cdiv(steps, max(min(wanted, SCRATCH_BYTES // part_bytes), 1)), 1)
    return per_part, max(cdiv(steps, per_part), 1)


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of the matmuls: fp32 is exact to fp32 unless the user allows tf32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def scalar_on(device: torch.device, scalar: Tensor) -> Tensor:
    """A 0-dim tensor on ``device``. From the CPU by a fill: unlike a copy it neither waits nor breaks a capture."""
    if scalar.device == device:
        return scalar
    return torch.full((), scalar.item(), dtype=scalar.dtype, device=device)


def number_for(device: torch.device, scalar: Tensor) -> Tensor | float:
    """A 0-dim tensor as kernels on ``device`` take a ``number``: by a pointer where it lies there, else as it is."""
    return scalar if scalar.device == device else scalar.item()


@cache
def _capability(index: int | None) -> tuple[int, int]:
    """(class of compute capability, number of multiprocessors) of a CUDA device. Class 90 has TMA and 227 KiB of shared
    memory; compute capability 12 has the one but not the other, and takes the tiles of class 80, which need 96 KiB."""
    properties = torch.cuda.get_device_properties(index)
    return (90 if properties.major in (9, 10, 11) else 80), properties.multi_processor_count


def capability(t: Tensor) -> int:
    """The class of compute capability whose tiles are used for ``t``."""
    return _capability(t.device.index)[0] if t.is_cuda else INTERPRETER


def programs(t: Tensor) -> int:
    """Programs that run at once on the device of ``t``; under the interpreter two, so that work is shared out."""
    return _capability(t.device.index)[1] if t.is_cuda else 2


def on_device_of(t: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; make that the one of ``t``."""
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(t.device)
