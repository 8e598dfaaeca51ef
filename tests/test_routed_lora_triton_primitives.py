"""pack, unpack, shrink and reduce in Triton on whole numbers, exact to the last bit; and what they may touch."""

from __future__ import annotations

import pytest
import torch
from addresses import only_elements_of, whole
from strategies import laid_out

from clora_kernels.kernels.routed_lora.algebra import Dropout, Needs, Projection, Term
from clora_kernels.reference.dropout_mask import dropout_mask
from clora_kernels.testing import guarded_outputs, launches

pytest.importorskip("triton", reason="the kernels are Triton's")

from clora_kernels.kernels.routed_lora import triton as kernels
from clora_kernels.kernels.routed_lora.tiles import ReduceTile, ShrinkTile
from clora_kernels.kernels.routed_lora.triton import common

BF16 = torch.bfloat16
SOME = ((True, True, True), (True, True, False), (True, False, False), (False, True, False), (False, False, True))
"""Wishes for three results."""


def projection(device, r, K, N, routing=True, frozen=False, bank=False, layout="contiguous", dtype=torch.float32):
    """Whole numbers in one layout; the scaling is 3, in fp64 on the CPU."""

    def new(rows, columns, largest):
        return laid_out(whole((rows, columns), largest, device, dtype), layout)

    square = (r, r, 3)
    live = new(*square) if routing else None
    index = torch.zeros(1, dtype=torch.int64, device=device) if bank else None
    return Projection(
        weight=None, lora_A=new(r, K, 99), lora_B=new(N, r, 99), routing=live[None] if bank else live,
        frozen_routing=new(*square) if frozen else None, routing_index=index, gate=None, bias=None, base_output=None,
        scaling=torch.tensor(3.0, dtype=torch.float64), seed=None, threshold=None,
    )  # fmt: skip


def routed(j):
    """(R_frozen + R, R), the identity where there is no routing."""
    live = torch.eye(len(j.lora_A), device=j.lora_A.device) if j.routing is None else j.routing
    return live if j.frozen_routing is None else live + j.frozen_routing, live


@pytest.mark.parametrize("layout", ["contiguous", "stepped", "transposed"])
@pytest.mark.parametrize("kind", ["plain", "routed", "frozen", "bank"])
@pytest.mark.parametrize("r, K, N", [(5, 70, 67), (40, 67, 66)])
def test_pack(device, r, K, N, kind, layout):
    options = {"routing": kind != "plain", "frozen": kind in ("frozen", "bank"), "bank": kind == "bank"}
    j = projection(device, r, K, N, **options, layout=layout)
    total, live = (torch.eye(r, device=device),) * 2 if kind == "bank" else routed(j)
    expected = (j.lora_A, 3 * total @ j.lora_B.mT, 3 * live @ j.lora_B.mT)
    for flags in SOME:
        if flags[2] and kind in ("plain", "bank"):
            continue
        with only_elements_of(*j) as outputs:
            packed = kernels.pack(j, BF16, *flags)
        assert sum(t.is_floating_point() and t.dim() == 2 for t in outputs) == sum(flags)
        for got, want, flag in zip(packed, expected, flags, strict=True):
            assert got is None if not flag else torch.equal(got, want.to(BF16)) and got.dtype == BF16
            assert got is None or (got.stride(0) % 8 == 0 and got.stride(1) == 1)


def test_pack_takes_an_A_of_the_dtype_as_it_is(device):
    j = projection(device, 5, 21, 19, dtype=BF16)
    packed = kernels.pack(j, BF16, True, True, False)
    assert packed.A is j.lora_A and torch.equal(packed.C, (3 * routed(j)[0].float() @ j.lora_B.float().mT).to(BF16))
    with launches() as names:
        assert kernels.pack(j, BF16, True, False, False).A is j.lora_A
    assert not names


@pytest.mark.parametrize("layout", ["contiguous", "stepped", "transposed"])
@pytest.mark.parametrize("kind", ["plain", "routed", "frozen", "plain frozen"])
@pytest.mark.parametrize("r, N", [(5, 67), (40, 259)])
def test_unpack(device, r, N, kind, layout):
    """259 columns are three parts, the last of one block that has three columns."""
    j = projection(device, r, 8, N, routing="plain" not in kind, frozen="frozen" in kind, layout=layout)
    U = laid_out(whole((r, N), 9, device), layout)
    total, live = routed(j)
    whole_ = (3 * (U.mT @ live), 3 * U @ j.lora_B, (total * (U @ j.lora_B)).sum().double())
    for lora_B, routing, scaling in SOME:
        routing = routing and j.routing is not None
        with only_elements_of(*j, U):
            found = kernels.unpack(j, U, Needs(False, False, lora_B, routing, False, False, scaling))
        for got, want, flag in zip(found, whole_, (lora_B, routing, scaling), strict=True):
            assert got is None if not flag else torch.equal(got, want) and got.dtype == want.dtype


def test_unpack_rounds_once_to_what_the_arguments_are(device):
    j = projection(device, 5, 8, 67, frozen=True, dtype=BF16)
    U = whole((5, 67), 9, device)
    dB, dR, _ = kernels.unpack(j, U, Needs(*[True] * 7))
    assert torch.equal(dB, (3 * (U.mT @ j.routing.float())).to(BF16)) and dB.dtype == BF16
    assert torch.equal(dR, (3 * U @ j.lora_B.float()).to(BF16)) and dR.dtype == BF16


def test_parts_of_unpack_are_of_a_number_that_N_alone_decides(device):
    for N, expected in ((1, 1), (128, 1), (129, 2), (4096, 32), (4097, 22)):
        j, U = projection(device, 1, 1, N), torch.ones(1, N, device=device)
        with guarded_outputs() as outputs:
            kernels.unpack(j, U, Needs(False, False, False, True, False, False, False))
        assert outputs[0].shape == (expected, 1, 1)


def drawn(device, j):
    """The j-th draw, of a seed and a threshold of its own."""
    return Dropout(torch.tensor(2**40 + 7 * j, device=device), torch.tensor(65536 - (32768 >> j % 3), device=device))


def masked(big, dropout, acts=True):
    return big if dropout is None or not acts else big * dropout_mask(*dropout, 0, *big.shape).float()


SHRINK = {"whole": ShrinkTile(16, 16, most_splits=1), "split": ShrinkTile(16, 16, least_steps=1, most_splits=4)}
TERMS = {"one": (5,), "three": (5, 16, 3), "not one read": (70, 200, 130)}


@pytest.mark.parametrize("layout", ["stepped", "transposed"])
@pytest.mark.parametrize("ranks", ["three", "one"])
@pytest.mark.parametrize("tile", SHRINK)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_shrink(device, with_tiles, dtype, tile, ranks, layout):
    """Each term with a gate, a draw and wishes of its own; 69 columns are five blocks, the last of five columns."""
    with_tiles(shrink=SHRINK[tile])
    M, K = 19, 69
    big = laid_out(whole((M, K), 9, device, dtype), layout)
    for draws, wishes in (((0, 1, 2), ((1, 1), (0, 1), (1, 0))), ((None, 3, 4), ((0, 1), (1, 1), (0, 1)))):
        terms = []
        for i, r in enumerate(TERMS[ranks]):
            small = laid_out(whole((r, K), 3, device, dtype), layout)
            gate = None if i == 2 else laid_out(whole((M, r), 3, device), layout)
            dropout = None if draws[i] is None else drawn(device, draws[i])
            terms.append(Term(small, dropout, i != 1, gate, *map(bool, wishes[i])))
        given = [t for term in terms for t in (term.small, term.gate, *(term.dropout or ()))]
        with only_elements_of(big, *given), launches() as names:
            found = kernels.shrink(big, terms)
        reads = 3 if ranks == "not one read" else 1
        assert names.count("shrink_kernel") == reads
        assert names.count("shrink_sums_kernel") == (reads if tile == "split" else 0)
        for (got, gated), t in zip(found, terms, strict=True):
            sums = masked(big.float(), t.dropout, t.masked) @ t.small.float().mT
            scaled = sums if t.dropout is None else sums * t.dropout.kept_value(torch.float32)
            scaled = scaled if t.gate is None else scaled * t.gate
            assert torch.equal(got, sums) and got.dtype == torch.float32 if t.want_sum else got is None
            assert torch.equal(gated, scaled.to(dtype)) and gated.dtype == dtype if t.want_gated else gated is None


REDUCE = {"whole": ReduceTile(16, 16, most_splits=1), "split": ReduceTile(16, 16, least_steps=1, most_splits=4)}


@pytest.mark.parametrize("layout", ["stepped", "transposed"])
@pytest.mark.parametrize("ranks", ["three", "one"])
@pytest.mark.parametrize("tile", REDUCE)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_reduce(device, with_tiles, dtype, tile, ranks, layout):
    """Each term with a draw of its own or none; 69 rows are five blocks, the last of five rows."""
    with_tiles(reduce=REDUCE[tile])
    M, K = 69, 37
    big = laid_out(whole((M, K), 9, device, dtype), layout)
    small = [laid_out(whole((M, r), 3, device, dtype), layout) for r in TERMS[ranks]]
    for draws in ((0, 1, 2), (3, None, 4), (None, None, None)):
        dropout = [None if i is None else drawn(device, i) for i in draws[: len(small)]]
        with only_elements_of(big, *small, *(t for d in dropout for t in d or ())), launches() as names:
            found = kernels.reduce(small, big, dropout)
        reads = 3 if ranks == "not one read" else 1
        assert names.count("reduce_kernel") == reads
        assert names.count("reduce_sums_kernel") == (len(small) if tile == "split" else 0)
        for got, t, d in zip(found, small, dropout, strict=True):
            assert torch.equal(got, t.float().mT @ masked(big.float(), d)) and got.dtype == torch.float32


def test_what_is_read_once_has_256_ranks(device, with_tiles):
    test_shrink(device, with_tiles, BF16, "split", "not one read", "contiguous")
    test_reduce(device, with_tiles, BF16, "split", "not one read", "contiguous")


def test_parts_are_added_in_their_order(device, with_tiles):
    """2^24 and then ones, which fp32 takes in only where they come first and together."""
    with_tiles(shrink=SHRINK["split"], reduce=REDUCE["split"])
    big = torch.zeros(1, 64, device=device)
    big[0, ::16] = torch.tensor([2.0**24, 1, 1, 1])
    ((found, _),) = kernels.shrink(big, [Term(torch.ones(1, 64, device=device), None, False, None, True, False)])
    assert found == 2.0**24
    (found,) = kernels.reduce([torch.ones(64, 1, device=device)], big.mT, [None])
    assert found == 2.0**24
    j = projection(device, 1, 8, 400)._replace(lora_B=torch.ones(400, 1, device=device))
    j = j._replace(scaling=torch.tensor(1.0), routing=torch.ones(1, 1, device=device))
    U = torch.zeros(1, 400, device=device)
    U[0, ::128] = torch.tensor([2.0**24, 1, 1, 1])
    _, dR, ds = kernels.unpack(j, U, Needs(*[True] * 7))
    assert dR == ds == 2.0**24


def test_scratch_is_limited(device, monkeypatch):
    """Parts fill the device, of several steps each, and fit what is allowed."""
    tile, t = ShrinkTile(16, 16, per_sm=4, most_splits=16, least_steps=2), torch.zeros(1, device=device)
    monkeypatch.setattr(common, "programs", lambda t: 10)
    wanted = {
        (64, 1, 8): (4, 16),
        (64, 10, 8): (16, 4),
        (6, 1, 8): (2, 3),
        (5, 1, 8): (3, 2),
        (1, 1, 8): (1, 1),
        (0, 1, 8): (1, 1),
        (64, 1, 8 << 20): (16, 4),
        (64, 1, 33 << 20): (64, 1),
        (100, 13, 8): (25, 4),
    }
    assert {call: common.split(*call, tile, t) for call in wanted} == wanted
