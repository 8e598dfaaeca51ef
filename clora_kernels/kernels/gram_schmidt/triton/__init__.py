"""Gram-Schmidt in Triton kernels: CUDA devices of compute capability 8.0 and above, fp32, bf16, fp16.

Every matrix of a batch is looked after by programs of its own, whose sums have an order that depends on nothing but its
shape. Nothing waits for the device: what a matrix needs no more is launched and over at once.
"""

from __future__ import annotations

from torch import Tensor

from ....reference.gram_schmidt import GramSchmidtResult
from ...routed_lora.triton.common import on_device_of
from ..algebra import Columns
from .deflate import deflate
from .products import combine, inner
from .small import small
from .solve import solve
from .sweeps import sweeps

__all__ = ["combine", "deficient", "forward", "inner", "solve"]


def forward(columns: Columns, rank_tol: float) -> GramSchmidtResult:
    """Small matrices in two launches, others in seven, in nine beside a basis."""
    with on_device_of(columns.V):
        return deflate(columns, *(small(columns, rank_tol) or sweeps(columns, rank_tol)), rank_tol)


def deficient(R: Tensor) -> bool:
    """True: asking would cost a launch and a wait."""
    return True
