"""The primitives as Triton kernels, for rows that share their choice: the L rows of a sample are one side of a matmul,
and the rows of the pool that the sample chose, read where they lie, the other. CUDA devices of compute capability 8.0
and above; fp32, bf16, fp16, mixed.

As the rounding contract has it, operands are rounded to the dtype of x, sums are fp32.
"""

from .expand import expand
from .reduce import order, reduce
from .shrink import shrink

__all__ = ["expand", "order", "reduce", "shrink"]
