"""The skinny products of routed LoRA by the compiled CPU operators (``csrc/routed_lora.cpp``), where they are built.

They convert and mask the big operand a block at a time in the first cache: no mask and no converted copy in memory, and
fp32 sums whatever the dtype. One thread of a Zen 4, 1576×768, rank 16, in µs beside ATen on blocks of rows: shrink with
dropout 1250 and 2400, reduce with dropout 1450 and 2400, reduce in bf16 530 and 750. Without dropout MKL and oneDNN are
as fast in fp32, and oneDNN twice as fast in bf16 where the processor has instructions for it and there are rows enough.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ... import extension
from .algebra import Dropout

_FEW_ROWS = 8  # up to here a call of oneDNN takes longer than the product


def takes(big: Tensor) -> bool:
    """Whether the operators, where they are built, take ``big``."""
    return big.is_cpu and big.dtype != torch.float64


def serves(big: Tensor) -> bool:
    """Whether the operators are built, and take ``big``."""
    return takes(big) and extension.has_op("routed_lora_shrink", "cpu")


def is_faster(big: Tensor) -> bool:
    """Whether a product without dropout, with a 16-bit result, is faster here than as a matmul of ATen."""
    if not serves(big) or big.dtype == torch.float32:
        return False
    return big.dtype == torch.float16 or big.shape[0] <= _FEW_ROWS or not _has_bf16_matmul()


@cache
def _has_bf16_matmul() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def folds(small: Tensor, scale: Tensor) -> bool:
    """Whether ``fold`` takes these."""
    return (
        small.dtype == scale.dtype == torch.float32
        and small.stride(1) == 1
        and scale.is_cpu
        and small.is_cpu
        and extension.has_op("routed_lora_fold", "cpu")
    )


def fold(small: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """s · smallᵀ for small [N, r] → [r, N], rounded once to the dtype of ``like``: one pass instead of three."""
    return torch.ops.clora_kernels.routed_lora_fold.default(small, scale, like)


def shrink(big: Tensor, small: Tensor, dropout: Dropout | None) -> Tensor:
    """(mask ⊙ big) [M, K] · smallᵀ ([r, K]) → [M, r] in fp32."""
    return torch.ops.clora_kernels.routed_lora_shrink.default(big, small, *_draw(dropout))


def reduce(small: Tensor, big: Tensor, dropout: Dropout | None) -> Tensor:
    """smallᵀ ([M, r]) · (mask ⊙ big) [M, K] → [r, K] in fp32."""
    return torch.ops.clora_kernels.routed_lora_reduce.default(small, big, *_draw(dropout))


def expand(
    y: Tensor, small: Tensor, C: Tensor, dropout: Dropout | None, first_row: int = 0, accumulate: bool = False
) -> Tensor:
    """y [M, N] = mask ⊙ (small [M, r] · C [r, N]), or y plus that, rounded once; returns y, whose rows are contiguous.

    first_row: of y in the mask. y shares no memory with the others.
    """
    torch.ops.clora_kernels.routed_lora_expand_.default(y, small, C, *_draw(dropout), first_row, accumulate)
    return y


def _draw(dropout: Dropout | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if dropout is None else (dropout.seed, dropout.threshold)


if extension.has_op("routed_lora_shrink", "cpu"):

    @torch.library.register_fake("clora_kernels::routed_lora_fold")
    def _(small: Tensor, scale: Tensor, like: Tensor) -> Tensor:
        return like.new_empty(small.shape[1], small.shape[0])

    @torch.library.register_fake("clora_kernels::routed_lora_shrink")
    def _(big: Tensor, small: Tensor, seed: Tensor | None, threshold: Tensor | None) -> Tensor:
        return big.new_empty(big.shape[0], small.shape[0], dtype=torch.float32)

    @torch.library.register_fake("clora_kernels::routed_lora_reduce")
    def _(small: Tensor, big: Tensor, seed: Tensor | None, threshold: Tensor | None) -> Tensor:
        return big.new_empty(small.shape[1], big.shape[1], dtype=torch.float32)

    @torch.library.register_fake("clora_kernels::routed_lora_expand_")
    def _(
        y: Tensor,
        small: Tensor,
        C: Tensor,
        seed: Tensor | None,
        threshold: Tensor | None,
        first_row: int,
        accumulate: bool,
    ) -> None:
        """It writes into y alone."""

    @torch.library.register_fake("clora_kernels::routed_lora_lay_down")
    def _(
        x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor, seed: Tensor | None, threshold: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape[0], lora_B.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0])

    @torch.library.register_fake("clora_kernels::routed_lora_lay_down_backward")
    def _(
        dy: Tensor,
        x: Tensor,
        q: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: Tensor,
        seed: Tensor | None,
        threshold: Tensor | None,
        need_x: bool,
        need_A: bool,
        need_B: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx = dy.new_empty(dy.shape[0] if need_x else 0, lora_A.shape[1])
        return dx, lora_A.new_empty(lora_A.shape if need_A else 0), lora_B.new_empty(lora_B.shape if need_B else 0)

    @torch.library.register_fake("clora_kernels::routed_lora_few_rows")
    def _(dy: Tensor, weight: Tensor, dx: Tensor) -> Tensor:
        return dx.new_empty(dx.shape)
