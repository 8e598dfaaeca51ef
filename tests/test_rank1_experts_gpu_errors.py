"""The compiled primitives of rank-1 experts on a GPU with arguments that are wrong or empty: refused, or harmless."""

from __future__ import annotations

import pytest
import torch
from rank1_experts_primitives import choose, on_cuda, randoms, reduce

from clora_kernels.kernels.rank1_experts import native
from clora_kernels.testing import guarded, guarded_outputs, poisoned_empty

pytestmark = [pytest.mark.gpu, on_cuda]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("L", [1, 5])
def test_indices_outside_the_pool_touch_nothing_outside(dtype, L):
    """They count as the nearest expert; the pool lies among rows of NaN."""
    G, k, n, E = 12, 6, 96, 10
    info = torch.iinfo(dtype)
    wild = torch.tensor([info.min, -1, E, E + 3, info.max, 4 * E], device="cuda").to(dtype)
    indices = choose(G, k, E, dtype)
    indices[:, 2:] = wild[torch.randint(6, (G, k - 2), device="cuda")]
    inside = indices.clamp(0, E - 1)
    rows = torch.full((5 * E, n), float("nan"), device="cuda")
    rows[2 * E : 3 * E] = randoms(E, n)
    pool, small, big = rows[2 * E : 3 * E], randoms(G * L, k), randoms(G * L, n)
    assert torch.equal(native.shrink(big, pool, indices), native.shrink(big, pool, inside))
    assert all(torch.equal(a, b) for a, b in zip(native.order(indices, E), native.order(inside, E), strict=True))
    with guarded_outputs():
        y = native.expand(small, pool, indices, None, torch.float32)
        out = reduce(small, big, indices, pool)
    assert torch.equal(y, native.expand(small, pool, inside, None, torch.float32))
    assert torch.equal(out, reduce(small, big, inside, pool))
    assert y.isfinite().all() and out.isfinite().all()


def test_a_wrong_order_touches_nothing_outside():
    G, k, n, E = 300, 4, 40, 12
    indices, small, big = choose(G, k, E), randoms(G, k), randoms(G, n)
    info = torch.iinfo(torch.int32)
    wrong = torch.randint(info.min, info.max, (G * k,), device="cuda", dtype=torch.int32)
    starts = torch.randint(info.min, info.max, (E + 1,), device="cuda", dtype=torch.int32)
    with guarded(torch.zeros(E, n, device="cuda")) as out, guarded(big) as big, guarded(small) as small:
        torch.ops.clora_kernels.rank1_experts_reduce_(out, small, big, indices, wrong, starts)


@pytest.mark.parametrize(
    "G, L, k, n, E", [(0, 1, 3, 8, 4), (3, 0, 2, 8, 4), (3, 2, 0, 8, 4), (3, 2, 2, 0, 4), (2, 1, 0, 8, 0)]
)
def test_empty_sizes(G, L, k, n, E):
    indices = torch.zeros(G, k, dtype=torch.int64, device="cuda")
    small, big, pool, base = randoms(G * L, k), randoms(G * L, n), randoms(E, n), randoms(G * L, n)
    with poisoned_empty():
        assert torch.equal(native.shrink(big, pool, indices), torch.zeros(G * L, k, device="cuda"))
        y = native.expand(small, pool, indices, base, torch.float32)
        assert torch.equal(y, base)
        assert torch.equal(reduce(small, big, indices, pool), torch.zeros(E, n, device="cuda"))


GOOD = {"big": (6, 8), "small": (6, 2), "experts": (5, 8), "y": (6, 8), "out": (5, 8)}


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("big", lambda t: t.double(), "big must be fp32, bf16 or fp16 on CUDA, got fp64"),
        ("big", lambda t: t.int(), "big must be fp32, bf16, fp16 or fp64"),
        ("big", lambda t: t[:5], "indices must have a row for each group of as many rows of big, which has 5, got 3"),
        ("big", lambda t: t[None], "big must have 2 dimensions, got 3"),
        ("big", lambda t: t.mT.contiguous().mT, "big must have contiguous rows"),
        ("big", lambda t: t.cpu(), "big must be on a CUDA device"),
        ("y", lambda t: t.double(), "y must be fp32, bf16 or fp16 on CUDA, got fp64"),
        ("y", lambda t: t[:1].expand(6, 8), "y must have rows that do not overlap"),
        ("experts", lambda t: t.double(), "experts and (big|y) must both be fp64, or neither"),
        ("experts", lambda t: t.cpu(), "experts must be on the device of (big|y)"),
        ("experts", lambda t: t[:, :7], "experts must have the columns of (big|y), 8, got 7"),
        ("experts", lambda t: t[:0], "indices must be within the pool of 0 experts"),
        ("indices", lambda t: t.short(), "indices must be int32 or int64"),
        ("indices", lambda t: t.flatten(), "indices must have 2 dimensions, got 1"),
        ("indices", lambda t: t.mT.contiguous().mT, "indices must be contiguous"),
        ("indices", lambda t: t.cpu(), "indices must be on the device of (big|y)"),
        ("small", lambda t: t.bfloat16(), "small must be fp32, as sums for (big|y) are"),
        ("small", lambda t: t.mT.contiguous().mT, "small must be contiguous"),
        ("small", lambda t: t[:, :1], "small must be 6 by 2, got 6 by 1"),
        ("small", lambda t: t[:3], "small must be 6 by 2, got 3 by 2"),
        ("base", lambda t: t.bfloat16(), "base must have the dtype of y"),
        ("base", lambda t: t[:, :4], "base must be 6 by 8, got 6 by 4"),
        ("out", lambda t: t[:1].expand(5, 8), "out must have rows that do not overlap"),
        ("out", lambda t: t[:, :7], "out must have the columns of big, 8, got 7"),
        ("order", lambda t: t.long(), "order must be int32"),
        ("order", lambda t: t[:4], "order must have 6 elements in 1 dimension, got 4 in 1"),
        ("starts", lambda t: t[:4], "starts must have 6 elements in 1 dimension, got 4 in 1"),
    ],
)
def test_operators_refuse(name, wrong, message):
    given = {key: randoms(*shape) for key, shape in GOOD.items()}
    given |= {"indices": choose(3, 2, 5), "base": randoms(6, 8)}
    given |= native.order(given["indices"], 5)._asdict()
    given[name] = wrong(given[name])
    calls = {
        "rank1_experts_shrink": ("big", "experts", "indices"),
        "rank1_experts_expand_": ("y", "small", "experts", "indices", "base"),
        "rank1_experts_reduce_": ("out", "small", "big", "indices", "order", "starts"),
    }
    for operator, arguments in calls.items():
        if name in arguments:
            with pytest.raises(RuntimeError, match=message):
                getattr(torch.ops.clora_kernels, operator)(*(given[argument] for argument in arguments))


@pytest.mark.parametrize("experts, message", [
    (-1, "experts must be within 0..2147483646, got -1"),
    (2**31 - 1, "experts must be within 0..2147483646, got 2147483647"),
    (0, "indices must be within the pool of 0 experts"),
])  # fmt: skip
def test_order_refuses(experts, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.clora_kernels.rank1_experts_order(choose(3, 2, 5), experts)
