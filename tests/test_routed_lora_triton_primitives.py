"""shrink and reduce in Triton on whole numbers, exact to the last bit; and what they may touch."""

from __future__ import annotations

import pytest
import torch
from addresses import only_elements_of, whole
from strategies import laid_out

from clora_kernels.kernels.routed_lora.algebra import Dropout, Term
from clora_kernels.reference.dropout_mask import dropout_mask
from clora_kernels.testing import launches

pytest.importorskip("triton", reason="the kernels are Triton's")

from clora_kernels.kernels.routed_lora import triton as kernels
from clora_kernels.kernels.routed_lora.tiles import ReduceTile, ShrinkTile
from clora_kernels.kernels.routed_lora.triton import common

BF16 = torch.bfloat16


def drawn(device, j):
    """The j-th draw, of a seed and a threshold of its own."""
    return Dropout(torch.tensor(2**40 + 7 * j, device=device), torch.tensor(65536 - (32768 >> j % 3), device=device))


def masked(big, dropout, acts=True):
    return big if dropout is None or not acts else big * dropout_mask(*dropout, 0, *big.shape).float()


SHRINK = {"whole": ShrinkTile(16, 16, most_splits=1), "split": ShrinkTile(16, 16, least_steps=1, most_splits=2)}
TERMS = {"one": (5,), "three": (5, 16, 3), "not one read": (70, 200, 130)}


@pytest.mark.parametrize("layout", ["stepped", "transposed"])
@pytest.mark.parametrize("ranks", ["three", "one"])
@pytest.mark.parametrize("tile", SHRINK)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_shrink(device, with_tiles, dtype, tile, ranks, layout):
    """Each term with a gate, a draw and wishes of its own; 37 columns are three blocks, the last of five columns."""
    with_tiles(shrink=SHRINK[tile])
    M, K = 19, 37
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


REDUCE = {"whole": ReduceTile(16, 16, most_splits=1), "split": ReduceTile(16, 16, least_steps=1, most_splits=2)}


@pytest.mark.parametrize("layout", ["stepped", "transposed"])
@pytest.mark.parametrize("ranks", ["three", "one"])
@pytest.mark.parametrize("tile", REDUCE)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_reduce(device, with_tiles, dtype, tile, ranks, layout):
    """Each term with a draw of its own or none; 37 rows are three blocks, the last of five rows."""
    with_tiles(reduce=REDUCE[tile])
    M, K = 37, 19
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
    with_tiles(shrink=ShrinkTile(16, 16, least_steps=1), reduce=ReduceTile(16, 16, least_steps=1))
    big = torch.zeros(1, 64, device=device)
    big[0, ::16] = torch.tensor([2.0**24, 1, 1, 1])
    ((found, _),) = kernels.shrink(big, [Term(torch.ones(1, 64, device=device), None, False, None, True, False)])
    assert found == 2.0**24
    (found,) = kernels.reduce([torch.ones(64, 1, device=device)], big.mT, [None])
    assert found == 2.0**24


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
