"""What tests of the compiled primitives of rank-1 experts share: the same in plain PyTorch, and parity with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from clora_kernels import extension
from clora_kernels.kernels.rank1_experts import native
from clora_kernels.testing import assert_parity

on_cuda = pytest.mark.skipif(
    not extension.has_op("rank1_experts_shrink", "cuda"), reason=f"not compiled: {extension.status()[1].detail}"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def chosen_rows(indices, M):
    return indices.long().repeat_interleave(M // max(indices.shape[0], 1), 0)


def plain_shrink(big, experts, indices):
    acc = torch.promote_types(big.dtype, torch.float32)
    return (experts[chosen_rows(indices, len(big))].to(acc) @ big.to(acc)[..., None])[..., 0]


def plain_expand(small, experts, indices, base, dtype):
    y = (small[:, None, :] @ experts[chosen_rows(indices, len(small))].to(small.dtype))[:, 0]
    y = y if base is None else base.to(small.dtype) + y
    return y if small.dtype == torch.float64 else y.to(dtype)


def plain_reduce(small, big, indices, experts):
    products = (small[..., None] * big.to(small.dtype)[:, None, :]).flatten(0, 1)
    total = torch.zeros(experts.shape, dtype=small.dtype, device=small.device)
    total.index_add_(0, chosen_rows(indices, len(small)).flatten(), products)
    return total if small.dtype == torch.float64 else total.to(experts.dtype)


def reduce(small, big, indices, experts):
    return native.reduce(small, big, indices, native.order(indices, experts.shape[0]), experts)


def assert_shrinks(big, experts, indices):
    inputs = {"big": big, "experts": experts, "indices": indices}
    assert_parity(native.shrink, inputs, reference=SimpleNamespace(forward=plain_shrink))


def assert_expands(small, experts, indices, base, dtype):
    inputs = {"small": small, "experts": experts, "indices": indices, "base": base, "dtype": dtype}
    assert_parity(native.expand, inputs, reference=SimpleNamespace(forward=plain_expand))


def assert_reduces(small, big, indices, experts):
    inputs = {"small": small, "big": big, "indices": indices, "experts": experts}
    assert_parity(reduce, inputs, reference=SimpleNamespace(forward=plain_reduce))


def randoms(*shape, dtype="fp32"):
    return torch.randn(*shape, device="cuda").to(DTYPES[dtype])


def choose(G, k, E, dtype=torch.int64):
    """Some twice in a row, and the last of three or more by none."""
    return torch.randint(max(E - 1, 1) if E > 2 else E, (G, k), device="cuda").to(dtype)
