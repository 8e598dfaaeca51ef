"""The primitives as compiled operators (``csrc/rank1_experts.cpp`` and ``.cu``): the chosen rows are read where they
lie, and nothing of size [M, k, n] is made.

Rows may lie apart, their elements not. Sums are fp32 (fp64 for fp64) whatever the dtypes; small operands stay
unrounded, but where the rows of a sample share their choice, all is bf16 and the processor multiplies that
(AVX512-BF16; the environment variable ``CLORA_CPU_BF16=0`` switches it off): q and c are rounded to bf16 then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import extension
from ...reference.routed_lora import accumulation_dtype
from .algebra import Order

_OPERATORS = torch.ops.clora_kernels
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_compiled(device_type: str) -> bool:
    return extension.has_op("rank1_experts_shrink", device_type)


def why_not(dtype: torch.dtype, experts: Tensor) -> str:
    """Why the compiled operators cannot take these experts beside rows in ``dtype``; empty if they can."""
    device = experts.device.type
    if not is_compiled(device):
        return extension.CPU_MISSING if device == "cpu" else f"the compiled part {device} is not there"
    if dtype == experts.dtype == torch.float64 and device == "cpu":
        return ""
    if dtype not in _DTYPES or experts.dtype not in _DTYPES:
        return f"it is not built for x in {dtype} with experts in {experts.dtype}"
    return ""


def _rows(t: Tensor) -> Tensor:
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


def shrink(big: Tensor, experts: Tensor, indices: Tensor) -> Tensor:
    return _OPERATORS.rank1_experts_shrink.default(_rows(big), _rows(experts), indices.contiguous())


def expand(small: Tensor, experts: Tensor, indices: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    # the operators mix fp64 with nothing
    apart = base is not None and (base.dtype == torch.float64) != (small.dtype == torch.float64)
    under = None if base is None or apart else _rows(base)
    y_dtype = small.dtype if apart else dtype if under is None else under.dtype
    y = experts.new_empty(small.shape[0], experts.shape[1], dtype=y_dtype)
    _OPERATORS.rank1_experts_expand_.default(y, small.contiguous(), _rows(experts), indices.contiguous(), under)
    return (y + base).to(base.dtype) if base is not None and apart else y


def order(indices: Tensor, experts: int) -> Order:
    return Order(*_OPERATORS.rank1_experts_order.default(indices.contiguous(), experts))


def reduce(small: Tensor, big: Tensor, indices: Tensor, order: Order, experts: Tensor) -> Tensor:
    out = experts.new_empty(experts.shape)
    _OPERATORS.rank1_experts_reduce_.default(out, small.contiguous(), _rows(big), indices.contiguous(), *order)
    return out


if extension.has_op("rank1_experts_shrink", "cpu") or extension.has_op("rank1_experts_shrink", "cuda"):

    @torch.library.register_fake("clora_kernels::rank1_experts_shrink")
    def _(big: Tensor, experts: Tensor, indices: Tensor) -> Tensor:
        return big.new_empty(big.shape[0], indices.shape[1], dtype=accumulation_dtype(big.dtype))

    @torch.library.register_fake("clora_kernels::rank1_experts_expand_")
    def _(y: Tensor, small: Tensor, experts: Tensor, indices: Tensor, base: Tensor | None) -> None:
        """It writes into y alone."""

    @torch.library.register_fake("clora_kernels::rank1_experts_order")
    def _(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        return indices.new_empty(indices.numel(), dtype=torch.int32), indices.new_empty(experts + 1, dtype=torch.int32)

    @torch.library.register_fake("clora_kernels::rank1_experts_reduce_")
    def _(out: Tensor, small: Tensor, big: Tensor, indices: Tensor, order: Tensor, starts: Tensor) -> None:
        """It writes into out alone."""
