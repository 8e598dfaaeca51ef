"""The dropout mask for users: which elements of x the adapter sees for a given draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.dropout_mask import dropout_mask as kernel
from .routed_lora.arguments import check_dropout, check_x, dropout_tensors


def dropout_mask(x: Tensor, dropout_p: float, dropout_seed: Tensor) -> Tensor:
    """The elements of ``x`` that a routed LoRA with this ``dropout_p`` and ``dropout_seed`` keeps.

    drop(x) = mask·x/(1 − t/65536) with t = round(65536·dropout_p). Philox-4x32-10 (Salmon et al., SC 2011) keyed by the
    seed, so every backend and device draws the same bits; see ``clora_kernels.reference.dropout_mask``.

    Args:
        x: ``[..., K]``; only its shape and device are used.
        dropout_p: 0 to 1.
        dropout_seed: 0-dim int64 tensor on the device of ``x``.

    Returns:
        Bool, the shape of ``x``, True where kept.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    check_mask(x, dropout_p, dropout_seed)
    seed, threshold = dropout_tensors(dropout_p, dropout_seed, True, x)
    if seed is None or threshold is None:
        return torch.ones(x.shape, dtype=torch.bool, device=x.device)
    return kernel(seed, threshold, 0, math.prod(x.shape[:-1]), x.shape[-1]).reshape(x.shape)


def check_mask(x: Tensor, dropout_p: float, dropout_seed: Tensor) -> None:
    """Raise as :func:`dropout_mask` would for these arguments."""
    check_x(x)
    if dropout_seed is None:
        raise TypeError("dropout_seed: got None, expected a 0-dim int64 tensor")
    check_dropout(dropout_p, dropout_seed, x)
