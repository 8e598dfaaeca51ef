"""The primitives of Gram-Schmidt as Triton kernels: CUDA devices of compute capability 8.0 and above, fp32, bf16, fp16.

Every matrix of a batch is looked after by programs of its own, whose sums have an order that depends on nothing but its
shape. Nothing waits for the device: what a matrix needs no more is launched and over at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra import Columns, Sweep
from .deflate import deflate
from .products import combine, combine_into, inner
from .small import small
from .solve import solve
from .step import step

__all__ = ["any", "apply", "combine", "deficient", "deflate", "gram", "inner", "small", "solve", "step"]


def any(flags: Tensor) -> bool:
    """Whether a flag is set; True on a GPU, which is not waited for."""
    return flags.is_cuda or bool(flags.any())


def deficient(R: Tensor) -> bool:
    """True: asking would cost a launch and a wait."""
    return True


def gram(columns: Columns, only: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
    """S [B, k, r] and G [B, r, r] in fp64."""
    V, P = columns
    return None if P is None else inner(P, V, torch.float64, only), inner(V, V, torch.float64, only)


def apply(columns: Columns, sweep: Sweep, out: Tensor, only: Tensor | None = None) -> None:
    """Write V·X − P·T to ``out``, rounded once."""
    V, P = columns
    terms = [(V, sweep.X)] + ([] if P is None else [(P, -sweep.T)])
    combine_into(out, terms, only)
