"""The compiled operators of routed LoRA, one by one: against fp64, their masks, bit patterns, memory and threads."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAYOUTS, laid_out

from clora_kernels import extension
from clora_kernels.kernels.routed_lora.compiled import is_faster
from clora_kernels.reference.dropout_mask import dropout_mask
from clora_kernels.reference.routed_lora_samples import make_inputs
from clora_kernels.testing import assert_parity, compare, guarded, poisoned_empty, unchanged

pytestmark = pytest.mark.skipif(
    not extension.has_op("routed_lora_shrink", "cpu"), reason=f"not compiled: {extension.status()[0].detail}"
)

OPS = torch.ops.clora_kernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NO_MASK = (None, None)
# Around what the blocks are made of: 6 and 32 rows, 8 rows that are few, 16, 128 and 512 columns, groups of 8.
ROWS = [0, 1, 2, 5, 6, 7, 8, 9, 12, 13, 31, 32, 33, 65]
COLUMNS = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 127, 128, 129, 200, 511, 512, 513, 1030]
RANKS = [1, 2, 5, 6, 7, 12, 13, 15, 16, 17, 32, 33, 96]


def proved(actual, formula, *operands, dtype=torch.float32):
    """Within the error of the formula in fp32, rounded once, of what the operands hold: the rule of the package."""
    truth = formula(*(t.double() for t in operands))
    plain = formula(*(t.float() for t in operands)).to(dtype)
    deviation = compare(actual, truth, plain, formula(*(t.double().abs() for t in operands)), torch.float32)
    assert deviation.ok, f"{deviation} for {[tuple(t.shape) for t in operands]}"
    assert actual.is_contiguous()


def kept_by(draw, first_row, rows, columns):
    return torch.ones(rows, columns) if draw[0] is None else dropout_mask(*draw, first_row, rows, columns)


@st.composite
def matrices(draw, rows, columns, dtypes=DTYPES):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    t = torch.randn(rows, columns, generator=generator).to(draw(st.sampled_from(dtypes)))
    return laid_out(t, draw(st.sampled_from(LAYOUTS if rows else LAYOUTS[:-1])))


@st.composite
def draws(draw):
    if draw(st.booleans()):
        return NO_MASK
    threshold = draw(st.sampled_from([0, 1, 20000, 65535, 65536]))
    return torch.tensor(draw(st.integers(-(2**63), 2**63 - 1))), torch.tensor(threshold)


SIZES = {"M": st.sampled_from(ROWS), "K": st.sampled_from(COLUMNS), "r": st.sampled_from(RANKS)}


@settings(max_examples=150)
@given(data=st.data(), drop=draws(), **SIZES)
def test_shrink(data, drop, M, K, r):
    big, small = data.draw(matrices(M, K)), data.draw(matrices(r, K))
    with unchanged(big, small), poisoned_empty():
        sums = OPS.routed_lora_shrink(big, small, *drop)
    kept = kept_by(drop, 0, M, K)
    proved(sums, lambda big, small: (big * kept) @ small.mT, big, small)


@settings(max_examples=150)
@given(data=st.data(), drop=draws(), **SIZES)
def test_reduce(data, drop, M, K, r):
    big, small = data.draw(matrices(M, K)), data.draw(matrices(M, r))
    with unchanged(big, small), poisoned_empty():
        sums = OPS.routed_lora_reduce(small, big, *drop)
    kept = kept_by(drop, 0, M, K)
    proved(sums, lambda big, small: small.mT @ (big * kept), big, small)


@settings(max_examples=150)
@given(data=st.data(), drop=draws(), first_row=st.sampled_from([0, 3, 2**40]), accumulate=st.booleans(), **SIZES)
def test_expand(data, drop, first_row, accumulate, M, K, r):
    small, C = data.draw(matrices(M, r)), data.draw(matrices(r, K))
    before = torch.randn(M, K).to(data.draw(st.sampled_from(DTYPES)))
    wide = torch.cat([before, before.new_full((M, 5), 7.0)], 1) if data.draw(st.booleans()) else before.clone()
    y = wide[:, :K]
    with unchanged(small, C), poisoned_empty():
        assert OPS.routed_lora_expand_(y, small, C, *drop, first_row, accumulate) is None
    kept = kept_by(drop, first_row, M, K)
    sign = 1.0 if accumulate else 0.0
    proved(y.contiguous(), lambda y, a, b: sign * y + kept * (a @ b), before, small, C, dtype=before.dtype)
    assert (wide[:, K:] == 7.0).all(), "between the rows nothing is written"


@settings(max_examples=150)
@given(data=st.data(), N=st.sampled_from(COLUMNS), r=st.sampled_from(RANKS), dtype=st.sampled_from(DTYPES))
def test_fold(data, N, r, dtype):
    small = data.draw(matrices(N, r, [torch.float32]).filter(lambda t: t.stride(1) == 1))
    with unchanged(small), poisoned_empty():
        folded = OPS.routed_lora_fold(small, torch.tensor(-1.7), torch.empty(0, dtype=dtype))
    assert torch.equal(folded, (small * torch.tensor(-1.7)).mT.to(dtype))


@settings(max_examples=150)
@given(data=st.data(), M=st.integers(1, 8), N=st.sampled_from(ROWS), K=st.sampled_from(COLUMNS))
def test_few_rows(data, M, N, K):
    dy, dx = data.draw(matrices(M, N)), data.draw(matrices(M, K))
    weight = data.draw(matrices(N, K).filter(lambda t: t.stride(1) == 1))
    with unchanged(dy, weight, dx), poisoned_empty():
        out = OPS.routed_lora_few_rows(dy, weight, dx)
    proved(out, lambda dy, weight, dx: dy @ weight + dx, dy, weight, dx, dtype=dx.dtype)


def adapter(dtype, **options):
    """The adapter alone, as the reference takes it; dy, and the tensors of its draw."""
    inputs = make_inputs(dtype=dtype, adapter_dtype=torch.float32, weight=False, routing=False, **options)
    dy = torch.randn(inputs["x"].shape[0], inputs["lora_B"].shape[0]).to(dtype)
    p = options.get("dropout_p")
    return inputs, dy, (inputs["dropout_seed"], torch.tensor(round(65536 * p))) if p else NO_MASK


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "M, K, N, r",
    [
        (0, 9, 5, 2), (1, 41, 29, 5), (2, 33, 47, 24), (3, 9, 1, 96), (4, 1, 517, 4), (5, 7, 260, 1),
        (6, 530, 20, 12), (7, 517, 131, 17), (8, 131, 70, 16), (9, 1, 3, 1), (9, 131, 517, 256), (1000, 33, 41, 8),
    ],
)  # fmt: skip
def test_lay_down_and_its_backward(M, K, N, r, dropout_p, dtype):
    inputs, dy, drop = adapter(dtype, lead=(M,), K=K, N=N, r=r, dropout_p=dropout_p)
    x, A, B = inputs["x"], inputs["lora_A"], inputs["lora_B"]
    s = torch.tensor(inputs["scaling"])
    with unchanged(x, A, B, dy), poisoned_empty():
        y, q = OPS.routed_lora_lay_down(x, A, B, s, *drop)
        dx, dA, dB = OPS.routed_lora_lay_down_backward(dy, x, q, A, B, s, *drop, True, True, True)
    names = ["x", "lora_A", "lora_B"]
    assert_parity({"y": y, "x": dx, "lora_A": dA, "lora_B": dB}, inputs, dy=dy, gradients=names)
    kept = kept_by(drop, 0, M, K) * (0.0 if dropout_p == 1 else 65536 / (65536 - round(65536 * dropout_p)))
    proved(q, lambda x, A: (x * kept) @ A.mT, x, A.to(dtype), dtype=dtype)
    for wanted in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (0, 0, 0)]:
        # what is not read need not be there: x for dA, q for dB
        read = x if wanted[1] else dy, q if wanted[2] else q.new_empty(0)
        some = OPS.routed_lora_lay_down_backward(dy, *read, A, B, s, *drop, *map(bool, wanted))
        for want, got, full in zip(wanted, some, (dx, dA, dB), strict=True):
            assert torch.equal(got, full) if want else got.numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [1, 8, 9])
def test_backward_reads_C_rounded(M, dtype):
    """dy of ones and A = I: dx is the sum of the rows of C, each rounded once, and the sum once."""
    r, N, s = 12, 2, torch.tensor(0.7)
    B = torch.randn(N, r)
    dx, _, _ = OPS.routed_lora_lay_down_backward(
        torch.ones(M, N, dtype=dtype), torch.ones(M, r, dtype=dtype), torch.ones(M, r, dtype=dtype),
        torch.eye(r), B, s, *NO_MASK, True, False, False,
    )  # fmt: skip
    assert torch.equal(dx, (s * B).to(dtype).float().sum(0).to(dtype).expand(M, r))


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 511, 513, 1030])
@pytest.mark.parametrize("first_row", [0, 2**33 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_are_those_of_dropout_mask(columns, first_row, dtype):
    """Ones and the identity leave nothing but the mask, bit for bit."""
    draw = torch.tensor(-5), torch.tensor(30000)
    for rows in (3, 40):
        whole, mask = torch.ones(rows, columns, dtype=dtype), dropout_mask(*draw, 0, rows, columns).float()
        assert torch.equal(OPS.routed_lora_shrink(whole, torch.eye(columns, dtype=dtype), *draw), mask)
        assert torch.equal(OPS.routed_lora_reduce(torch.eye(rows), whole, *draw), mask)
        y = torch.full_like(whole, 2.0)
        OPS.routed_lora_expand_(y, torch.ones(rows, 1), torch.ones(1, columns), *draw, first_row, True)
        assert torch.equal(y.float(), 2 + dropout_mask(*draw, first_row, rows, columns).float())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_pattern_is_read_as_torch_reads_it(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[None]
    read = OPS.routed_lora_reduce(torch.ones(1, 1), patterns, *NO_MASK)
    assert torch.equal(read.nan_to_num(nan=0.5), patterns.float().nan_to_num(nan=0.5))
    assert torch.equal(read.isnan(), patterns.isnan())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_any_fp32_pattern_is_rounded_as_torch_rounds_it(dtype):
    """Ties, subnormals, overflow to Inf, Inf and NaN of any payload."""
    patterns = torch.randint(-(2**31), 2**31, (2**20,), dtype=torch.int64)
    high = patterns[: 2**19] // 2**12 * 2**12  # ties of both types
    bits = torch.cat([patterns, high, torch.tensor([0x7F800000, 0x7F800001, 0x7FFFFFFF, -1, 0x7F7FFFFF, 1])])
    values = bits.to(torch.int32).view(torch.float32)[:, None]
    rounded = OPS.routed_lora_fold(values, torch.tensor(1.0), torch.empty(0, dtype=dtype))[0]
    expected = values[:, 0].to(dtype)
    assert torch.equal(rounded.isnan(), expected.isnan())
    assert torch.equal(rounded.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))


@pytest.mark.parametrize("special", [float("inf"), float("nan")])
@pytest.mark.parametrize("M, K, r", [(5, 21, 3), (9, 131, 7), (40, 530, 17)])
def test_inf_and_nan_reach_what_they_should_and_nothing_else(M, K, r, special):
    """In padded rows, columns and ranks a zero makes NaN of them."""
    big, small, other = torch.randn(M, K), torch.randn(r, K), torch.randn(M, r)
    big[-1, -1] = special

    def same(actual, expected):
        assert torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.isinf(), expected.isinf())

    same(OPS.routed_lora_shrink(big, small, *NO_MASK), big @ small.mT)
    same(OPS.routed_lora_reduce(other, big, *NO_MASK), other.mT @ big)
    other[-1, -1] = special
    y = torch.empty(M, K)
    OPS.routed_lora_expand_(y, other, small, *NO_MASK, 0, False)
    same(y, other @ small)
    for N in range(1, 9):  # whole steps of rows and what is left of them
        weight = torch.randn(N, K)
        weight[-1, -1] = special
        dy = torch.randn(3, N)
        same(OPS.routed_lora_few_rows(dy, weight, torch.zeros(3, K)), dy @ weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_of_one_sign(dtype):
    """In one chain of additions their rounding errors add up."""
    a = torch.randn(9, 2048).abs().to(dtype)
    proved(OPS.routed_lora_shrink(a, a[:1], *NO_MASK), lambda big, small: big @ small.mT, a, a[:1])
    tall, zeros = a.mT.contiguous(), torch.zeros(2, 9)
    proved(OPS.routed_lora_reduce(tall, tall, *NO_MASK), lambda small, big: small.mT @ big, tall, tall)
    rows = OPS.routed_lora_few_rows(a[:2], tall, zeros)
    proved(rows, lambda dy, weight, dx: dy @ weight + dx, a[:2], tall, zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_term_swallows_no_more_than_its_piece(dtype):
    """2²⁴ + 1 is 2²⁴ in fp32, but not 2²⁴ + 128: of the ones only those in the chain of the large term are lost."""
    ones, large = torch.ones(10, 4096, dtype=dtype), torch.ones(4096, dtype=dtype)
    large[0] = 2**24
    sums = [
        OPS.routed_lora_shrink(large.expand(10, 4096), ones, *NO_MASK),
        OPS.routed_lora_reduce(large[:, None], ones.mT, *NO_MASK),
        OPS.routed_lora_few_rows(large[None], ones.mT.contiguous(), torch.zeros(1, 10)),
    ]
    for found in sums:
        assert (found > 2**24 + 4096 - 1024 - 32).all(), found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype):
    M, K, r = 301, 1030, 24
    big, small, other, C = (torch.randn(s).to(dtype) for s in ((M, K), (r, K), (M, r), (r, K)))
    weight, dy = torch.randn(70, K).to(dtype), torch.randn(8, 70).to(dtype)
    drop = torch.tensor(9), torch.tensor(20000)

    def everything():
        y = torch.empty(M, K, dtype=dtype)
        OPS.routed_lora_expand_(y, other, C, *drop, 5, False)
        rows = OPS.routed_lora_few_rows(dy, weight, big[:8])
        adapter = small.float(), torch.randn(70, r, generator=torch.Generator().manual_seed(1))
        wanted = torch.tensor(0.5), *drop, True, True, True
        of_rows = OPS.routed_lora_lay_down_backward(dy, big[:8], other[:8], *adapter, *wanted)
        return *of_rows, y, rows, OPS.routed_lora_shrink(big, small, *drop), OPS.routed_lora_reduce(other, big, *drop)

    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for other_result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other_result, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("M, K, r", [(5, 37, 3), (13, 530, 17)])
def test_memory_around_operands_is_left_alone(M, K, r, offset, dtype):
    """Every operand starts in the middle of a vector, between margins that stay as they are."""
    shapes = {"big": (M, K), "small": (r, K), "other": (M, r), "C": (r, K), "y": (M, K)}
    plain = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}

    def everything(big, small, other, C, y):
        OPS.routed_lora_expand_(y, other, C, *NO_MASK, 0, True)
        return OPS.routed_lora_shrink(big, small, *NO_MASK), OPS.routed_lora_reduce(other, big, *NO_MASK), y.clone()

    with ExitStack() as stack:
        moved = {name: stack.enter_context(guarded(t, offset)) for name, t in plain.items()}
        results = everything(**moved)
    assert all(torch.equal(a, b) for a, b in zip(results, everything(**plain), strict=True))


def test_where_it_is_faster():
    assert is_faster(torch.empty(3, 8, dtype=torch.float16)) and is_faster(torch.empty(8, 8, dtype=torch.bfloat16))
    assert not is_faster(torch.empty(3, 8)) and not is_faster(torch.empty(3, 8, dtype=torch.float64))
