"""linear in Triton on whole numbers, exact to the last bit; what it may touch; and what all kernels share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from addresses import only_elements_of, whole
from strategies import laid_out
from test_routed_lora_triton_primitives import BF16, drawn, masked

from clora_kernels.reference.dropout_mask import dropout_mask
from clora_kernels.testing import launches

pytest.importorskip("triton", reason="the kernels are Triton's")

import triton
import triton.language as tl

from clora_kernels.kernels.routed_lora import tiles
from clora_kernels.kernels.routed_lora import triton as kernels
from clora_kernels.kernels.routed_lora.tiles import LinearTile
from clora_kernels.kernels.routed_lora.triton import common, linear_kernels

TILE = LinearTile(16, 32, 16, group_m=2)
DEPTHS = {0: (), 1: (37,), 3: (24, 16, 40), 4: (24, 16, 40, 20)}
RANKS = (5, 40, 16, 3)


def whole_call(device, products, draws, dtype=torch.float32, layout="contiguous", M=37, N=45):
    """Operands of ``linear`` in one layout, and the exact sum, which bf16 has to round."""
    depths = DEPTHS[products]
    of = [(whole((M, K), 9, device, dtype), whole((K, N), 9, device, dtype)) for K in depths]
    if layout == "described":  # b comes transposed, as from a weight [N, K]
        of = [(a, b.mT.contiguous().mT) for a, b in of]
    elif layout != "rows":
        of = [(laid_out(a, layout), laid_out(b, layout)) for a, b in of]
    low, exact = [], torch.zeros(M, N, device=device)
    for i, draw in enumerate(draws):
        q, C = whole((M, RANKS[i]), 9, device, dtype), whole((RANKS[i], N), 9, device, dtype)
        if layout not in ("described", "rows"):
            q, C = laid_out(q, layout), laid_out(C, layout)
        dropout = None if draw is None else drawn(device, draw)
        low.append((q, C, dropout))
        exact += masked(q.float() @ C.float(), dropout)
    for a, b in of:
        exact += a.float() @ b.float()
    return of, low, exact


def checked(products, low, exact, bias=None, base=None):
    operands = [*(t for pair in products for t in pair), *(t for q, C, d in low for t in (q, C, *(d or ())))]
    with only_elements_of(*operands, bias, base), launches() as names:
        y = kernels.linear(products, low, bias, base)
    wanted = exact if bias is None else exact + bias
    wanted = wanted if base is None else wanted + base
    dtype = low[0][0].dtype if base is None else base.dtype
    assert y.dtype == dtype and torch.equal(y, wanted.to(dtype))
    return names


DRAWS = [(None,), (0,), (0, 1, None), (None, 2), (None, None, None)]


@pytest.mark.parametrize("layout", ["stepped", "transposed"])
@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("products", DEPTHS)
def test_linear_by_pointers(device, with_tiles, products, draws, layout):
    with_tiles(linear=TILE)
    of, low, exact = whole_call(device, products, draws, layout=layout)
    bias = laid_out(whole((45,), 3, device), "stepped")
    base = laid_out(whole((37, 45), 3, device, torch.float64), layout) if products == 0 else None
    assert checked(of, low, exact, bias, base) == ["linear_kernel"]


@pytest.mark.parametrize("layout", ["rows", "described"])
@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("products", [1, 2, 3])
def test_linear_by_descriptors(device, with_tiles, monkeypatch, products, draws, layout):
    with_tiles(linear=TILE)
    monkeypatch.setitem(DEPTHS, products, (24, 40, 16)[:products])
    of, low, exact = whole_call(device, products, draws, BF16, layout, N=48)
    described = common.capability(exact) != 80
    assert checked(of, low, exact) == ["linear_tma_kernel" if described else "linear_kernel"]
    bias, base = whole((48,), 3, device, BF16), laid_out(whole((37, 48), 3, device, BF16), "padded")
    checked(of, low, exact, bias, base)


def test_what_cannot_be_described_goes_by_pointers(device):
    """Strides that are no 16 bytes, a base that is not, a y of another dtype, operands that lie differently."""
    if common.capability(torch.zeros(1, device=device)) == 80:
        return
    of, low, exact = whole_call(device, 1, (None,), layout="rows", N=48)
    assert checked(of, low, exact) == ["linear_kernel"], "37 columns of fp32 are no multiple of 16 bytes"
    (of, low, exact) = whole_call(device, 3, (None,), layout="rows", N=48)
    assert checked(of, low, exact) == ["linear_tma_kernel"]
    mixed = [of[0], (of[1][0], of[1][1].mT.contiguous().mT), of[2]]
    assert checked(mixed, low, exact) == ["linear_kernel"]
    moved = [(laid_out(of[0][0], "offset"), of[0][1]), *of[1:]]
    assert checked(moved, low, exact) == ["linear_kernel"]
    wide = torch.zeros(37, 48, dtype=torch.float64, device=device)
    assert checked(of, low, exact, None, wide) == ["linear_kernel"]
    odd, low, exact = whole_call(device, 3, (None,), layout="described", N=45)
    assert checked(odd, low, exact) == ["linear_kernel"], "45 columns of y are not, those of b^T are"
    of, low, exact = whole_call(device, 4, (None,), layout="rows", N=48)
    assert checked(of, low, exact) == ["linear_kernel"], "more products than a launch has descriptors for"


def test_the_tile_is_the_one_for_the_call(device, monkeypatch):
    """The deepest product, the largest rank, a draw in any of the terms."""
    keys, default = [], tiles.default
    monkeypatch.setattr(tiles, "default", lambda key: keys.append(key) or default(key))
    of, low, _ = whole_call(device, 3, (None, 2), BF16, "rows", N=48)
    kernels.linear(of, low)
    capability = common.capability(low[0][0])
    options = {"bucket": 2, "terms": 3, "dropout": True, "tma": capability != 80}
    assert keys == [tiles.Key("linear", capability, "bf16", N=48, K=40, r=64, **options)]


def test_nothing_of_no_rows(device):
    for M, N in ((0, 7), (7, 0)):
        of, low, _ = whole_call(device, 1, (0,), M=M, N=N)
        assert kernels.linear(of, low).shape == (M, N)


@triton.jit
def places(out_ptr, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    for i in range(tiles_m * tiles_n):
        row, column = linear_kernels.place_of(i, tiles_m, tiles_n, GROUP_M)
        tl.store(out_ptr + 2 * i, row)
        tl.store(out_ptr + 2 * i + 1, column)


def test_tiles_go_column_by_column_in_groups_of_rows(device):
    out = torch.zeros(15, 2, dtype=torch.int32, device=device)
    places[(1,)](out, 5, 3, GROUP_M=2)
    groups = ((0, 1), (2, 3), (4,))
    assert out.tolist() == [[row, column] for rows in groups for column in range(3) for row in rows]


def test_rank_tiles_hold_what_registers_do():
    assert (linear_kernels.most_ranks(4), linear_kernels.most_ranks(2)) == (32, 64)


FAR = 1 << 27
"""A stride of which 17 are 2^31 elements: 4 GiB in 16 bit, of which a few pages are touched."""


@triton.jit
def moved(from_ptr, to_ptr, stride, ROWS: tl.constexpr, ACROSS: tl.constexpr):
    offs, one = tl.arange(0, ROWS), tl.arange(0, 16)
    if ACROSS:
        tile = common.load_tile(from_ptr, 1, stride, one, offs, one < 1, offs < 17)
        common.store_tile(to_ptr, 1, stride, one, offs, one < 1, offs < 17, tile)
    else:
        tile = common.load_tile(from_ptr, stride, 1, offs, one, offs < 17, one < 1)
        common.store_tile(to_ptr, stride, 1, offs, one, offs < 17, one < 1, tile)


@pytest.mark.parametrize("across", [False, True])
def test_addresses_beyond_two_to_the_31_elements(device, across):
    memory = torch.empty(17 * FAR, dtype=BF16, device=device)
    column, beside = memory[::FAR].copy_(torch.arange(17)), memory[1::FAR]
    with only_elements_of(column) as outputs:
        outputs.append(beside)
        moved[(1,)](column, beside, FAR, ROWS=32, ACROSS=across)
    assert torch.equal(beside, column)
    of, low, exact = whole_call(device, 0, (None,), BF16, M=3, N=17)
    checked(of, low, exact, column)


@triton.jit
def mask_of(out_ptr, seed_ptr, threshold_ptr, columns, BLOCK: tl.constexpr):
    offs_m, offs_k = tl.arange(0, 16), tl.arange(0, BLOCK)
    keep = common.kept(tl.load(seed_ptr), common.load_threshold(threshold_ptr), offs_m, 0, columns, 16, BLOCK)
    tl.store(out_ptr + offs_m[:, None] * BLOCK + offs_k[None, :], keep)


def test_masks_of_wide_rows(device):
    """Row 8 of 2^31 - 8 columns begins beyond 2^31 groups of eight, row 16 would beyond 2^32."""
    columns, groups = 2**31 - 8, 2**28 - 1
    out, draw = torch.zeros(16, 16, dtype=torch.bool, device=device), drawn(device, 0)
    mask_of[(1,)](out, *draw, columns, BLOCK=16)
    for row in range(16):
        assert torch.equal(out[row].view(2, 8), dropout_mask(*draw, row * groups, 2, 8)), row


@pytest.mark.parametrize("value", [1.0, 1.00390625, 1.01171875, -3.0e-39, float("inf"), float("nan"), 60000.0])
def test_numbers_are_widened_and_rounded_as_torch_does(device, value):
    """Ties of bf16 to even, both ways; subnormal numbers; what is not finite."""
    for dtype in (BF16, torch.float16, torch.float32):
        base = torch.full((3, 5), value, dtype=torch.float32, device=device)
        zero = torch.zeros(3, 1, dtype=dtype, device=device), torch.zeros(1, 5, dtype=dtype, device=device)
        y = kernels.linear([], [(*zero, None)], base[0])
        assert torch.equal(y.nan_to_num(7), base.to(dtype).nan_to_num(7)) and y.dtype == dtype
        for wide in (torch.float32, torch.float64):
            y = kernels.linear([], [(*zero, None)], base[0].to(dtype), torch.zeros(3, 5, dtype=wide, device=device))
            assert torch.equal(y.nan_to_num(7), base.to(dtype).to(wide).nan_to_num(7))


def test_fp32_is_exact_unless_tf32_is_allowed():
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        for allow, of_fp32 in ((False, "ieee"), (True, "tf32")):
            torch.backends.cuda.matmul.allow_tf32 = allow
            assert [common.precision(t) for t in (torch.float32, BF16, torch.float16)] == [of_fp32, "ieee", "ieee"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def test_classes_of_compute_capability(monkeypatch):
    properties = {i: SimpleNamespace(major=m, multi_processor_count=100 + i) for i, m in enumerate((8, 9, 10, 11, 12))}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.get)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: f"on {device.index}")
    common._capability.cache_clear()
    on = [SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=i)) for i in properties]
    assert [common.capability(t) for t in on] == [80, 90, 90, 90, 80]
    assert [common.programs(t) for t in on] == [100, 101, 102, 103, 104]
    assert common.on_device_of(on[1]) == "on 1" and common.on_device_of(on[0]) != "on 0"
    common._capability.cache_clear()


def test_scalars_go_to_the_device_they_are_asked_on(device):
    here = torch.tensor(3.5, dtype=torch.float64, device=device)
    assert common.scalar_on(here.device, here) is here
    moved = common.scalar_on(torch.device("meta"), torch.tensor(3.5, dtype=torch.float64))
    assert (moved.device.type, moved.dtype, moved.shape) == ("meta", torch.float64, ())
