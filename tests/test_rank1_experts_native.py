"""The compiled primitives of rank-1 experts: sizes around their blocks, dtypes, strides, threads, errors."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from rank1_experts_primitives import plain_expand, plain_reduce, plain_shrink
from strategies import LAYOUTS, laid_out

from clora_kernels import extension
from clora_kernels.kernels.rank1_experts import native
from clora_kernels.reference.routed_lora import accumulation_dtype
from clora_kernels.testing import compare, guarded, guarded_outputs, poisoned_empty, unchanged

pytestmark = pytest.mark.skipif(
    not extension.has_op("rank1_experts_shrink", "cpu"), reason=f"not compiled: {extension.status()[0].detail}"
)

OPS = torch.ops.clora_kernels
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
MIXES = [(a, b) for a in (F32, BF16, F16) for b in (F32, BF16, F16)] + [(F64, F64)]
GROUPS = [(7, 1), (3, 3), (2, 70)]  # (G, L): tiles are of 3 and 4 rows
COLUMNS = [1, 7, 64, 515, 1027]  # vectors are of 8, steps of 16, blocks of 128 to 512
CHOICES = [1, 5, 33]


def shrink_in(dtype, big, experts, indices):
    return plain_shrink(big.to(dtype), experts.to(dtype), indices)


def expand_in(dtype, small, experts, indices, base):
    return plain_expand(small.to(dtype), experts, indices, base, dtype)


def reduce_in(dtype, small, big, indices, experts):
    return plain_reduce(small.to(dtype), big, indices, experts.to(dtype))


def assert_right(actual, form, out_dtype, *tensors, plain=None):
    """``form`` in fp64 is the truth, in the dtype of the sums the reference unless ``plain`` is, of absolute values the
    magnitude."""
    sums = accumulation_dtype(out_dtype)
    floating = lambda t: t is not None and t.is_floating_point()  # noqa: E731
    magnitude = form(F64, *(t.abs() if floating(t) else t for t in tensors))
    plain = form(sums, *tensors).to(out_dtype) if plain is None else plain
    found = compare(actual, form(F64, *tensors), plain, magnitude, sums)
    assert found.ok, str(found)


def drawn(G, L, k, n, E, big=F32, experts=F32, index=torch.int64):
    sums = accumulation_dtype(big)
    return (
        torch.randn(G * L, n).to(big),
        torch.randn(E, n).to(experts),
        torch.randint(E, (G, k)).to(index),
        torch.randn(G * L, k, dtype=sums),
    )


def assert_all_right(big, experts, indices, small, base=None):
    """Each primitive; ``base`` stands for the dtype and layout of y's."""
    with unchanged(big, experts, indices, small), poisoned_empty():
        p = native.shrink(big, experts, indices)
        y = native.expand(small, experts, indices, base, big.dtype)
        order = native.order(indices, experts.shape[0])
        d = native.reduce(small, big, indices, order, experts)
    assert_right(p, shrink_in, accumulation_dtype(big.dtype), big, experts, indices)
    assert_right(y, expand_in, big.dtype, small, experts, indices, base)
    assert_right(d, reduce_in, experts.dtype, small, big, indices, experts)


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("k", CHOICES)
@pytest.mark.parametrize("G, L", GROUPS)
@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_against_fp64(dtypes, G, L, k, n):
    big, experts, indices, small = drawn(G, L, k, n, 11, *dtypes)
    for base in (None, torch.randn(G * L, n).to(big.dtype)):
        assert_all_right(big, experts, indices, small, base)


@pytest.mark.parametrize("G, L", [(1, 1), (1, 2), (5, 4), (400, 1), (60, 8)])
@pytest.mark.parametrize("E", [1, 3, 700, 5000])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_pools_of_every_size(index, E, G, L):
    """Pools that fit into a cache or not, read often or not: each goes through them in its own way."""
    for dtypes in ((F32, F32), (BF16, BF16), (F32, F16)):
        assert_all_right(*drawn(G, L, 4, 300, E, *dtypes, index=index))


@pytest.mark.parametrize("k", [63, 64, 65, 68, 130])
@pytest.mark.parametrize("G, L", [(3, 1), (2, 9)])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (F16, F32)], ids=str)
def test_many_choices(dtypes, G, L, k):
    assert_all_right(*drawn(G, L, k, 530, 9, *dtypes))


@pytest.mark.parametrize("name, layout", [
    *product(["big", "experts", "base", "small"], LAYOUTS), *product(["indices"], ["transposed", "offset", "expanded"]),
])  # fmt: skip
@pytest.mark.parametrize("G, L", [(6, 1), (2, 9)])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_layouts(dtype, G, L, name, layout):
    big, experts, indices, small = drawn(G, L, 3, 45, 8, dtype, dtype)
    named = {
        "big": big,
        "experts": experts,
        "indices": indices,
        "small": small,
        "base": torch.randn(G * L, 45).to(dtype),
    }
    named[name] = laid_out(named[name], layout)
    assert_all_right(**named)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("strides", [(0, 1), (60, 1)], ids=str)
def test_operators_read_rows_that_lie_anywhere(strides, dtype):
    """Without the copies that the Python side makes of what they cannot read."""
    big, experts, indices, small = drawn(4, 3, 3, 45, 8, dtype, dtype)
    storage = torch.randn(12 * 60).to(dtype)
    big, experts = storage.as_strided((12, 45), strides), storage.as_strided((8, 45), strides)
    base, y = storage.as_strided((12, 45), strides, 5), torch.empty(12, 60, dtype=dtype)[:, :45]
    assert_right(OPS.rank1_experts_shrink(big, experts, indices), shrink_in, small.dtype, big, experts, indices)
    OPS.rank1_experts_expand_(y, small, experts, indices, base)
    assert_right(y, expand_in, dtype, small, experts, indices, base)
    out, (order, starts) = torch.empty(8, 60, dtype=dtype)[:, :45], OPS.rank1_experts_order(indices, 8)
    OPS.rank1_experts_reduce_(out, small, big, indices, order, starts)
    assert_right(out, reduce_in, dtype, small, big, indices, experts)


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_y_may_be_its_own_base(dtypes):
    big, experts, indices, small = drawn(4, 3, 3, 700, 8, *dtypes)
    y = big.clone()
    OPS.rank1_experts_expand_(y, small, experts, indices, y)
    assert torch.equal(y, native.expand(small, experts, indices, big, big.dtype))


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F64, F64)], ids=str)
@pytest.mark.parametrize(
    "G, L, k, n, E", [(0, 1, 3, 5, 4), (3, 0, 3, 5, 4), (3, 2, 3, 0, 4), (3, 2, 0, 5, 4), (0, 0, 3, 5, 0)]
)
def test_empty(G, L, k, n, E, dtypes):
    big, experts, small = torch.randn(G * L, n), torch.randn(E, n), torch.randn(G * L, k)
    big, experts, small = big.to(dtypes[0]), experts.to(dtypes[1]), small.to(accumulation_dtype(dtypes[0]))
    indices = torch.randint(max(E, 1), (G, k))
    with poisoned_empty():
        assert torch.equal(native.shrink(big, experts, indices), torch.zeros_like(small))
        for base in (None, big):
            y = native.expand(small, experts, indices, base, big.dtype)
            assert torch.equal(y, torch.zeros_like(big) if base is None else base)
        d = native.reduce(small, big, indices, native.order(indices, E), experts)
    assert torch.equal(d, torch.zeros_like(experts))


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("L, k", [(1, 1), (1, 4), (5, 2)])
def test_a_hot_expert(dtypes, L, k):
    """Thousands of like terms round alike: in a single chain of additions their errors add up to far more than those of
    chains of 64, which alone are granted here."""
    big, experts, indices, small = drawn(3000 // L, L, k, 70, 50, *dtypes)
    indices[:] = 17
    indices[5, 0] = 3
    big, small = big[:1].abs().repeat(3000, 1), torch.full_like(small, 1.7)
    d = native.reduce(small, big, indices, native.order(indices, 50), experts)
    step = 64 // k // L * L
    chains = [
        reduce_in(F32, small[m : m + step], big[m : m + step], indices[m // L : (m + step) // L], experts).double()
        for m in range(0, 3000, step)
    ]
    plain = sum(chains).to(experts.dtype)
    assert_right(d, reduce_in, experts.dtype, small, big, indices, experts, plain=plain)


def test_duplicates_count_as_often():
    big, experts, _, small = drawn(6, 1, 4, 40, 5)
    indices = torch.tensor([[2, 2, 2, 2]] * 6)
    assert_all_right(big, experts, indices, small)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F64, F64)], ids=str)
@pytest.mark.parametrize(
    "G, L, k, n, E", [(3000, 1, 8, 300, 40), (3000, 1, 2, 300, 5000), (20, 77, 5, 800, 30), (1000, 1, 1, 900, 2)]
)
def test_bits_do_not_depend_on_threads(all_threads, dtypes, G, L, k, n, E):
    big, experts, indices, small = drawn(G, L, k, n, E, *dtypes)
    if E == 2:
        indices[:] = 1
    found = []
    for threads in (1, max(all_threads, 2), 3, 7):
        torch.set_num_threads(threads)
        order = native.order(indices, E)
        found.append((
            native.shrink(big, experts, indices),
            native.expand(small, experts, indices, big, big.dtype),
            native.reduce(small, big, indices, order, experts),
            *order,
        ))  # fmt: skip
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtypes", MIXES[:-1], ids=str)
@pytest.mark.parametrize("L", [1, 7])
def test_a_row_has_the_bits_that_it_has_alone(dtypes, L):
    """Alone it is read in another tile, and its pool another number of times."""
    big, experts, indices, small = drawn(200, L, 9, 600, 100, *dtypes)
    p, y = native.shrink(big, experts, indices), native.expand(small, experts, indices, None, big.dtype)
    for m in (0, 5, 199 * L, 200 * L - 1):
        alone, one = slice(m, m + 1), indices[m // L : m // L + 1]
        assert torch.equal(native.shrink(big[alone], experts, one), p[alone])
        assert torch.equal(native.expand(small[alone], experts, one, None, big.dtype), y[alone])


def test_every_half_is_read_as_it_is():
    """As a row of the pool and as a base, subnormal numbers and infinities too; NaN stays NaN."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(F16).view(64, 1024)
    ones, each = torch.ones(64, 1), torch.arange(64)[:, None]
    found = native.expand(ones, halves, each, None, F32)
    assert ((found == halves.float()) | (found.isnan() & halves.isnan())).all()
    under = native.expand(torch.zeros(64, 0), halves, each[:, :0], halves, F16)
    assert ((under == halves) | (under.isnan() & halves.isnan())).all()


def test_blocks_of_rows_beyond_the_caches():
    big, experts, indices, small = drawn(9000, 1, 2, 1000, 20)
    d = native.reduce(small, big, indices, native.order(indices, 20), experts)
    assert_right(d, reduce_in, F32, small, big, indices, experts)


@pytest.mark.parametrize("E, shape", [(1, (5, 3)), (7, (400, 3)), (3000, (50, 4)), (9, (0, 3)), (4, (3, 0))])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_order_is_a_stable_sort(E, shape, index):
    indices = torch.randint(E, shape).to(index)
    order, starts = native.order(indices, E)
    assert order.dtype == starts.dtype == torch.int32
    assert torch.equal(order.long(), torch.sort(indices.flatten(), stable=True).indices)
    assert torch.equal(starts.long().diff(), torch.bincount(indices.flatten(), minlength=E)) and starts[0] == 0


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@pytest.mark.parametrize("G, L, k, n", [(9, 1, 5, 77), (3, 5, 3, 530)])
def test_writes_stay_within_outputs(dtypes, G, L, k, n):
    big, experts, indices, small = drawn(G, L, k, n, 6, *dtypes)
    with guarded_outputs():
        native.expand(small, experts, indices, None, big.dtype)
        native.reduce(small, big, indices, native.order(indices, 6), experts)
    order = native.order(indices, 6)
    for offset in (0, 1):
        for like in (big, laid_out(big, "padded")):
            with guarded(like, offset) as y:
                OPS.rank1_experts_expand_(y, small, experts, indices, None)
        with guarded(experts, offset) as out:
            OPS.rank1_experts_reduce_(out, small, big, indices, *order)
