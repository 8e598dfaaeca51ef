"""Checks of the arguments of rank-1 experts: each error names the argument, what came and what was expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..routed_lora.arguments import check_shape, check_tensor


def check_experts(name: str, experts: Any, columns: int | None, meaning: str) -> None:
    """Raise unless ``experts`` is a pool [E, columns] with an expert in it."""
    if experts.dim() != 2 or (columns is not None and experts.shape[1] != columns):
        expected = f"(E, {'N' if columns is None else columns})"
        raise ValueError(f"{name}: got shape {tuple(experts.shape)}, expected {expected} = (experts, {meaning})")
    if experts.shape[0] == 0:
        raise ValueError(f"{name}: got a pool of 0 experts, expected at least 1")


def check_pool(experts_A: Any, experts_B: Any, K: int | None = None, N: int | None = None) -> None:
    """Raise unless both are the sides of one pool."""
    check_tensor("experts_A", experts_A)
    check_experts("experts_A", experts_A, K, "in_features")
    check_tensor("experts_B", experts_B, experts_A.device, of="experts_A")
    check_experts("experts_B", experts_B, N, "out_features")
    if experts_A.shape[0] != experts_B.shape[0]:
        E, other = experts_A.shape[0], experts_B.shape[0]
        raise ValueError(f"experts_B: got {other} experts, expected {E}, those of experts_A")


def check_index_tensor(indices: Any, experts_A: Tensor) -> None:
    """Raise unless ``indices`` is an integer tensor whose rows choose at least one expert."""
    check_tensor("indices", indices, experts_A.device, floating=False, of="experts_A")
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices: got dtype {indices.dtype}, expected int64 or int32")
    if indices.dim() == 0 or indices.shape[-1] == 0:
        raise ValueError(f"indices: got shape {tuple(indices.shape)}, expected [..., k] with k of at least 1")


def check_chosen(x: Tensor, indices: Any, gates: Any, experts_A: Tensor) -> None:
    """Raise unless indices, and gates of their shape, are those of samples or of tokens of x."""
    check_index_tensor(indices, experts_A)
    lead = tuple(x.shape[:-1])
    got, k = tuple(indices.shape), indices.shape[-1]
    per_token, per_sample = (*lead, k), (*lead[:1], k)
    if got != per_token and not (x.dim() > 2 and got == per_sample):
        expected = f"{per_token} = x.shape[:-1] + (k,)"
        if x.dim() > 2:
            expected += f", or {per_sample} = (x.shape[0], k) where all tokens of a sample share them"
        raise ValueError(f"indices: got shape {got}, expected {expected}")
    check_gates(gates, indices)


def check_gates(gates: Any, indices: Tensor) -> None:
    if gates is not None:
        check_tensor("gates", gates, indices.device, of="indices")
        check_shape("gates", gates, tuple(indices.shape), "the shape of indices")
