"""pack and unpack in Triton on whole numbers, exact to the last bit; and what they may touch."""

from __future__ import annotations

import pytest
import torch
from addresses import only_elements_of, whole
from strategies import laid_out

from clora_kernels.kernels.routed_lora.algebra import Needs, Projection
from clora_kernels.testing import guarded_outputs, launches

pytest.importorskip("triton", reason="the kernels are Triton's")

from clora_kernels.kernels.routed_lora import triton as kernels

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
    # the scaling is on the CPU, and so is its gradient
    whole_ = (3 * (U.mT @ live), 3 * U @ j.lora_B, (total * (U @ j.lora_B)).sum().double().to(j.scaling.device))
    for lora_B, routing, scaling in SOME:
        routing = routing and j.routing is not None
        with only_elements_of(*j, U):
            found = kernels.unpack(j, U, Needs(False, False, lora_B, routing, False, False, scaling))
        for got, want, flag in zip(found, whole_, (lora_B, routing, scaling), strict=True):
            assert got is None if not flag else torch.equal(got, want) and got.dtype == want.dtype


@pytest.mark.parametrize("where", ["there", "here"])
def test_the_scaling_comes_as_a_number_or_by_a_pointer(device, where):
    """From the device, and from the CPU, which are one under the interpreter."""
    j = projection(device, 5, 8, 67, frozen=True)._replace(scaling=torch.tensor(3.0, dtype=torch.float64))
    if where == "there":
        j = j._replace(scaling=j.scaling.to(device))
    U, (total, live) = whole((5, 67), 9, device), routed(j)
    packed = kernels.pack(j, BF16, True, True, True)
    dB, dR, ds = kernels.unpack(j, U, Needs(*[True] * 7))
    assert torch.equal(packed.C, (3 * total @ j.lora_B.mT).to(BF16))
    assert torch.equal(packed.C_live, (3 * live @ j.lora_B.mT).to(BF16))
    assert torch.equal(dB, 3 * (U.mT @ live)) and torch.equal(dR, 3 * U @ j.lora_B)
    assert ds.dtype == torch.float64 and ds.device == j.scaling.device


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


def test_parts_of_unpack_are_added_in_their_order(device):
    """2^24 and then ones, which fp32 takes in only where they come first and together."""
    j = projection(device, 1, 8, 400)._replace(lora_B=torch.ones(400, 1, device=device))
    j = j._replace(scaling=torch.tensor(1.0), routing=torch.ones(1, 1, device=device))
    U = torch.zeros(1, 400, device=device)
    U[0, ::128] = torch.tensor([2.0**24, 1, 1, 1])
    _, dR, ds = kernels.unpack(j, U, Needs(*[True] * 7))
    assert dR == ds == 2.0**24
