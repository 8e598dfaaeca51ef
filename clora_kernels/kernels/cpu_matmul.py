"""fp32 matmuls by the faster of the two libraries that torch carries on a CPU: MKL and oneDNN.

MKL runs its AVX-512 kernels on Intel's processors alone; oneDNN goes by what the processor can do. Measured on an AMD
EPYC (Zen 5), one thread, fp32, milliseconds by MKL and by oneDNN: 1576×768×768 19.4 and 9.0, 64×2048×2048 6.6 and 3.1,
a rank of 16 against 1576×768 0.54 and 0.21. Either multiplies and sums in fp32, but oneDNN in longer chains: its error
is 1.6 times MKL's at an inner dimension of 1024 and 2.2 times at 2048 and beyond, so long sums are made in pieces.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# A call of oneDNN costs 12 µs before it does anything, of MKL 2 µs: the two are level at about 2 MFLOP where AVX-512
# has units of its own (Zen 5), at 10 where it takes those of AVX2 twice (Zen 4: 96 and 103 µs for 544×128×64).
_LEAST_FLOPS_FULL_WIDTH, _LEAST_FLOPS = 1 << 21, 1 << 24
# MKL multiplies a narrow result faster the other way round: 544×64×8 in 14 µs, and 4
# to lay it out, instead of 26.
_NARROW, _LONGEST_NARROW_SUM = 16, 256
# With fewer rows oneDNN takes as long to reorder the other operand as MKL for everything.
_LEAST_ROWS = 8
_LONGEST_SUM = 1024
# Where a piece of b must be copied: its scratch is at most half of the result's size with twice as many rows as this.
_COPIED_PIECE = 256
# For a narrower result the pieces cost what they gain: 1576×3072×16 takes 2.7 ms by MKL and by pieces 3.2.
_LEAST_COLUMNS_OF_PIECES = 64
_BLOCK_BYTES = 2 << 20  # of the result of a piece: in smaller blocks it is slower, in larger ones it leaves the cache


@cache
def _processor() -> tuple[str, int]:
    """Vendor and family as Linux tells them."""
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "", 0
    found = dict(re.findall(r"^(vendor_id|cpu family)\s*: (\S+)$", said, re.MULTILINE))
    return found.get("vendor_id", ""), int(found.get("cpu family", 0))


@cache
def _onednn_linear() -> torch._ops.OpOverload | None:
    """oneDNN's linear layer on strided tensors where it is built in and MKL would not run its best kernels."""
    if _processor()[0] == "GenuineIntel":
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) and torch.ops.mkldnn._linear_pointwise.default


@cache
def _least_flops() -> int:
    vendor, family = _processor()
    return _LEAST_FLOPS_FULL_WIDTH if vendor == "AuthenticAMD" and family >= 26 else _LEAST_FLOPS


def goes_to_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether :func:`matmul` takes oneDNN for a·b, where torch would take MKL."""
    (m, k), n = a.shape, b.shape[1]
    return bool(
        2 * m * k * n >= _least_flops()
        and m >= _LEAST_ROWS
        and (k <= _LONGEST_SUM or n >= _LEAST_COLUMNS_OF_PIECES)
        and (k <= _LONGEST_SUM or m >= 2 * _COPIED_PIECE or b.is_contiguous())
        and a.dtype == torch.float32
        and a.is_cpu
        # a is copied if it has gaps, and over a b with gaps oneDNN falls back to loops a thousand times slower
        and (a.is_contiguous() or a.numel() <= b.numel())
        and (b.is_contiguous() or b.mT.is_contiguous())
        and torch.backends.mkldnn.enabled
        and _onednn_linear() is not None
    )


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [m, k] · b [k, n] (+ bias [n]) in the dtype of all three; any dtype and device."""
    if goes_to_onednn(a, b):
        # a bias with gaps would be read as if it had none
        return _by_onednn(a, b, None if bias is None else bias.contiguous())
    if (
        bias is None
        and a.is_cpu
        and b.shape[1] <= _NARROW
        and a.shape[1] <= _LONGEST_NARROW_SUM
        and a.dtype == torch.float32
    ):
        return (b.mT @ a.mT).mT.contiguous()
    return a @ b if bias is None else torch.addmm(bias, a, b)


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    linear = _onednn_linear()
    assert linear is not None
    (m, k), n = a.shape, b.shape[1]
    if k <= _LONGEST_SUM:
        return linear(a, b.mT, bias, "none", [], "")
    y = a.new_empty(m, n)
    rows = max(_BLOCK_BYTES // (4 * n), 64)
    length = _LONGEST_SUM if b.is_contiguous() else _COPIED_PIECE
    for start in range(0, k, length):
        piece = slice(start, start + length)
        weight = b[piece].mT if b.is_contiguous() else b.mT[:, piece].contiguous()
        for first in range(0, m, rows):
            block = slice(first, first + rows)
            take = y[block].add_ if start else y[block].copy_
            take(linear(a[block, piece].contiguous(), weight, None if start else bias, "none", [], ""))
    return y


def goes_faster_in_blocks(a: Tensor, b: Tensor) -> bool:
    """Whether y += a·b is faster as blocks of rows of :func:`matmul`, each added to y, than as one ``addmm_`` of MKL.

    The addition costs what oneDNN gains at an inner dimension of 16; at 64, 1024×64×2048 takes 2.8 ms and 1.5.
    """
    return a.shape[1] >= 32 and goes_to_onednn(a, b)
