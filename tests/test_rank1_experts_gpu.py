"""The compiled primitives of rank-1 experts on a GPU: parity for all dtypes and regimes, the same bits every time,
nothing waits for the GPU, graphs replay on other choices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rank1_experts_primitives import (
    DTYPES,
    assert_expands,
    assert_reduces,
    assert_shrinks,
    choose,
    on_cuda,
    plain_expand,
    plain_reduce,
    randoms,
    reduce,
)

from clora_kernels.kernels.rank1_experts import native
from clora_kernels.testing import assert_parity, guarded_outputs, poisoned_empty

pytestmark = [pytest.mark.gpu, on_cuda]

PAIRS = [(a, b) for a in DTYPES for b in DTYPES]
CASES = {  # G, L, k, n, E
    "per token": (37, 1, 5, 264, 29),
    "per sample": (3, 50, 7, 136, 19),
    "samples of few rows": (11, 3, 33, 72, 40),
    "one row": (1, 1, 32, 4096, 64),
    "one row of many columns": (1, 1, 2, 20000, 9),
    "one expert each": (90, 1, 1, 520, 300),
    "odd sizes": (23, 1, 3, 131, 17),
    "odd sizes per sample": (4, 13, 70, 1031, 7),
    "few columns": (65, 1, 9, 3, 5),
    "many choices": (1500, 1, 16, 256, 100),
    "many choices of few": (30, 40, 8, 128, 3),
    "hardly any chosen": (20, 1, 4, 64, 5000),
}


@pytest.mark.parametrize("dtypes", PAIRS, ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtypes):
    """The first dtype is that of the rows that are read most, the second that of what meets them."""
    (G, L, k, n, E), (first, second) = CASES[case], dtypes
    indices = choose(G, k, E, torch.int32 if first == "bf16" else torch.int64)
    small = randoms(G * L, k)
    with guarded_outputs(), poisoned_empty():
        assert_shrinks(randoms(G * L, n, dtype=second), randoms(E, n, dtype=first), indices)
        for base in (None, randoms(G * L, n, dtype=second)):
            assert_expands(small, randoms(E, n, dtype=first), indices, base, DTYPES[second])
        assert_reduces(small, randoms(G * L, n, dtype=first), indices, randoms(E, n, dtype=second))


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "offset"])
@pytest.mark.parametrize("apart", [0, 3, 16], ids=["dense", "odd", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("L", [1, 6])
def test_rows_anywhere(L, dtype, apart, offset):
    """What lies between rows and around them is NaN: it spoils every sum it gets into, and nothing is written there."""
    G, k, n, E = 9, 11, 320, 21
    memories = []

    def laid(t):
        memory = torch.full((len(t) * (n + apart) + 128 + offset,), float("nan"), dtype=t.dtype, device="cuda")
        memories.append((memory, memory.as_strided(t.shape, (n + apart, 1), 64 + offset)))
        return memories[-1][1].copy_(t)

    indices, small = choose(G, k, E), randoms(G * L, k)
    big, base, y = (laid(randoms(G * L, n, dtype=dtype)) for _ in range(3))
    pool, out = (laid(randoms(E, n, dtype=dtype)) for _ in range(2))
    assert_shrinks(big, pool, indices)
    assert_expands(small, pool, indices, base, base.dtype)
    assert_reduces(small, big, indices, pool)
    torch.ops.clora_kernels.rank1_experts_expand_(y, small, pool, indices, base)
    torch.ops.clora_kernels.rank1_experts_reduce_(out, small, big, indices, *native.order(indices, E))
    same = SimpleNamespace(forward=plain_expand)
    assert_parity(
        {"y": y}, {"small": small, "experts": pool, "indices": indices, "base": base, "dtype": y.dtype}, reference=same
    )
    same = SimpleNamespace(forward=plain_reduce)
    assert_parity({"y": out}, {"small": small, "big": big, "indices": indices, "experts": pool}, reference=same)
    for memory, rows in memories:
        rows.fill_(float("nan"))
        assert memory.isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("G, k, E", [(1, 1, 1), (7, 5, 3), (300, 40, 1), (4000, 9, 70000), (3, 2, 257), (50, 3, 256)])
def test_order_is_the_stable_one(G, k, E, dtype):
    indices = choose(G, k, E, dtype)
    with poisoned_empty():
        order, starts = native.order(indices, E)
    assert order.dtype == starts.dtype == torch.int32
    assert torch.equal(order.long(), indices.flatten().sort(stable=True).indices)
    below = torch.bincount(indices.flatten(), minlength=E).cumsum(0)
    assert starts[0] == 0 and torch.equal(starts[1:].long(), below)


def test_a_pool_beyond_the_cache():
    """Each expert is chosen several times, so shrink goes through the columns in chunks and adds their sums."""
    n, k = 8192, 8
    E = torch.cuda.get_device_properties(0).L2_cache_size // (2 * n)

    def products(big, experts, indices):
        acc = torch.promote_types(big.dtype, torch.float32)
        return (big.to(acc) @ experts.to(acc).mT).gather(1, indices)

    inputs = {"big": randoms(E, n, dtype="bf16"), "experts": randoms(E, n, dtype="bf16"), "indices": choose(E, k, E)}
    assert_parity(native.shrink, inputs, reference=SimpleNamespace(forward=products))
    assert torch.equal(native.shrink(**inputs), native.shrink(**inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "L, G, n, aside", [(1, 13000, 40, 0), (1, 13000, 40, 400), (9, 1444, 40, 0), (9, 1444, 40, 30), (1, 40, 2048, 0)]
)
def test_a_hot_expert(dtype, L, G, n, aside):
    """One expert has all choices but a few: its sum goes through hundreds of chunks, or has more tiles than chunks."""
    k, E = 8, 9
    indices = torch.full((G, k), 4, device="cuda")
    indices[torch.randint(G, (aside,), device="cuda"), 3] = torch.randint(E - 1, (aside,), device="cuda")
    assert_reduces(randoms(G * L, k), randoms(G * L, n, dtype=dtype), indices, randoms(E, n, dtype=dtype))


def test_sums_of_every_chunk_border():
    """Runs of all lengths around a chunk's, so that they begin and end at, before and behind its ends."""
    lengths = [*range(1, 40), 63, 64, 65, 31, 1, 32, 33, 96, 1, 127, 128, 129, 2, 255, 256, 257, 400]
    indices = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).reshape(-1, 1).cuda()
    for L in (1, 2, 5):
        big, pool = randoms(len(indices) * L, 24), randoms(len(lengths) + 3, 24)
        assert_reduces(randoms(len(indices) * L, 1), big, indices, pool)


@pytest.mark.parametrize("case", ["per sample", "one row", "many choices", "many choices of few", "odd sizes"])
def test_every_call_gives_the_same_bits(case):
    G, L, k, n, E = CASES[case]
    indices, small = choose(G, k, E), randoms(G * L, k)
    big, pool = randoms(G * L, n, dtype="bf16"), randoms(E, n)

    def results():
        order = native.order(indices, E)
        return [
            *order,
            native.shrink(big, pool, indices),
            native.expand(small, pool, indices, None, torch.float32),
            native.reduce(small, big, indices, order, pool),
        ]

    first = results()
    for _ in range(5):
        torch.empty(10**7, device="cuda").fill_(float("nan"))  # what is allocated next has been written to
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


@pytest.mark.parametrize("L", [1, 4])
def test_nothing_synchronises(no_syncs, L):
    G, k, n, E = 700, 8, 128, 60
    indices, small, big, pool = choose(G, k, E), randoms(G * L, k), randoms(G * L, n), randoms(E, n)

    def step():
        native.shrink(big, pool, indices)
        native.expand(small, pool, indices, big, torch.float32)
        reduce(small, big, indices, pool)

    step()
    with no_syncs():
        step()


def test_a_graph_replays_on_other_choices():
    """What was captured while every expert was chosen alike replays for a hot one, and for indices of all kinds."""
    G, k, n, E = 2000, 8, 64, 50
    indices, small, big, pool = choose(G, k, E), randoms(G, k), randoms(G, n), randoms(E, n)
    others = [choose(G, k, E), torch.full_like(indices, 7), torch.arange(G * k, device="cuda").reshape(G, k) % E]

    def step():
        p = native.shrink(big, pool, indices)
        return p, native.expand(p, pool, indices, big, torch.float32), reduce(small, big, indices, pool)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for other in others:
        indices.copy_(other)
        big.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_nothing_of_the_size_of_all_choices_is_made():
    G, k, n, E = 4096, 32, 512, 64
    indices, small, big, pool = choose(G, k, E), randoms(G, k), randoms(G, n, dtype="bf16"), randoms(E, n)
    order = native.order(indices, E)
    whole = G * k * n * 4
    for run, largest in [
        (lambda: native.shrink(big, pool, indices), G * k * 4),
        (lambda: native.expand(small, pool, indices, None, torch.bfloat16), G * n * 2),
        (lambda: native.reduce(small, big, indices, order, pool), E * n * 4 + max(whole // 128, 4096 * n)),
    ]:
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        assert torch.cuda.max_memory_allocated() - before <= largest + 4096
        assert largest < whole / 8


def test_pools_beyond_31_bits():
    """The last rows of a pool of more elements than int32 counts; each operator has to reach them."""
    E, n = 33000, 66000
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    pool = torch.zeros(E, n, dtype=torch.bfloat16, device="cuda")
    pool[-3:] = randoms(3, n, dtype="bf16")
    indices = torch.tensor([[E - 1, 0], [E - 3, E - 2]], device="cuda")
    small, big, few = randoms(2, 2), randoms(2, n), indices - (E - 3)
    few[0, 1] = 3
    last = torch.cat([pool[-3:], pool[:1]])
    assert torch.equal(native.shrink(big, pool, indices), native.shrink(big, last, few))
    expected = native.expand(small, last, few, None, torch.float32)
    assert torch.equal(native.expand(small, pool, indices, None, torch.float32), expected)
    out = reduce(small, big, indices, pool)
    assert torch.equal(torch.cat([out[-3:], out[:1]]), reduce(small, big, few, last))
    assert not out[1:-3].any()
