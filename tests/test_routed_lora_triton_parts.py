"""The Triton kernels of routed LoRA beyond their numbers: layouts, dropout masks, repeatability, dispatch, tiles."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from strategies import DIFFERENTIABLE, LAYOUTS, dy_for, fused, laid_out, made, tensors_of

from clora_kernels import explain, info, routed_lora_linear
from clora_kernels.kernels.routed_lora.algebra import Dropout, Term
from clora_kernels.reference.dropout_mask import dropout_mask
from clora_kernels.testing import assert_parity, evaluate, guarded, launches, unchanged

pytest.importorskip("triton", reason="the kernels are Triton's")

import triton
import triton.language as tl

from clora_kernels.kernels.routed_lora import tiles
from clora_kernels.kernels.routed_lora import triton as kernels
from clora_kernels.kernels.routed_lora.tiles import Key, LinearTile, ReduceTile, ShrinkTile, Tuned
from clora_kernels.kernels.routed_lora.triton import common

OPTIONS = {"frozen": True, "gate": (3, 7, 5), "scaling": None, "dropout_p": 0.2}
TENSORS = ("x", "weight", "lora_A", "lora_B", "routing", "frozen_routing", "bias", "gate")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("name", ["x", "weight", "dy", "all"])
def test_layouts(device, name, layout):
    inputs = made((3, 7), 40, 32, 5, dtypes="bf16+fp32", **OPTIONS, device=device)
    for key in TENSORS if name == "all" else [name]:
        if key != "dy":
            inputs[key] = laid_out(inputs[key], layout)
    dy = dy_for(inputs, layout if name in ("dy", "all") else "contiguous")
    with unchanged(dy, *tensors_of(inputs)):
        assert_parity(fused, inputs, dy=dy)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize("offset", [1, 3])
def test_base_pointers_aligned_to_one_element(device, dtypes, offset):
    inputs = made((3, 7), 40, 32, 5, dtypes=dtypes, **OPTIONS, device=device)
    with ExitStack() as stack:
        moved = {k: stack.enter_context(guarded(v, offset)) if k in TENSORS else v for k, v in inputs.items()}
        dy = stack.enter_context(guarded(dy_for(inputs), offset))
        with launches() as names:
            assert_parity(fused, moved, dy=dy)
    assert "linear_tma_kernel" not in names


def test_gradient_of_a_sum_has_stride_0(device):
    inputs = made((3, 7), **OPTIONS, device=device)
    x = inputs["x"].requires_grad_()
    (through_sum,) = torch.autograd.grad(fused(**inputs).sum(), x)
    y = fused(**inputs)
    (through_ones,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(through_sum, through_ones)


def test_bitwise_repeatable(device, with_tiles):
    with_tiles(shrink=ShrinkTile(16, 16, least_steps=1), reduce=ReduceTile(16, 16, least_steps=1))
    inputs = made((3, 7), 50, 140, 6, dtypes="bf16+fp32", **{**OPTIONS, "gate": (6,)}, device=device)
    dy, names = dy_for(inputs), DIFFERENTIABLE[:-1]
    first, second = (evaluate(fused, inputs, dy, names) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("row", [0, 20])
def test_a_row_that_is_not_finite_stays_alone(device, row):
    """What is masked is not multiplied by zero: NaN times 0 is NaN."""
    inputs = made((37,), 45, 51, 6, dtypes="bf16+fp32", dropout_p=0.5, device=device)
    inputs["x"][row] = float("nan")
    bad = fused(**inputs).isnan().any(1)
    assert bad[row] and bad.sum() == 1


SEEDS = (0, -1, 2**40 + 17, -(2**63))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threshold", [0, 1, 20000, 65536])
def test_masks_are_those_of_the_definition(device, seed, threshold):
    """Recovered from each kernel: by an identity in shrink and reduce, by a column of ones in linear."""
    M, K = 19, 37
    drawn = Dropout(torch.tensor(seed, device=device), torch.tensor(threshold, device=device))
    mask = dropout_mask(*drawn, 0, M, K)
    ones, identity = torch.ones(M, K, device=device), torch.eye
    ((found, value),) = kernels.shrink(ones, [Term(identity(K, device=device), drawn, True, None, True, True)])
    assert torch.equal(found.bool(), mask) and torch.equal(value, mask * drawn.kept_value(torch.float32))
    (found,) = kernels.reduce([identity(M, device=device)], ones, [drawn])
    assert torch.equal(found.bool(), mask)
    found = kernels.linear([], [(ones[:, :1], ones[:1], drawn)])
    assert torch.equal(found.bool(), mask)


@triton.jit
def mask_of_rows(out_ptr, seed_ptr, threshold_ptr, first_row, columns, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK)
    threshold = common.load_threshold(threshold_ptr)
    keep = common.kept(tl.load(seed_ptr), threshold, first_row + offs_m, 0, columns, BLOCK_M, BLOCK)
    tl.store(out_ptr + offs_m[:, None] * BLOCK + offs_k[None, :], keep)


def test_rows_beyond_two_to_the_32(device):
    seed, threshold = torch.tensor(2**50 + 3, device=device), torch.tensor(30000, device=device)
    first, out = 2**33 + 5, torch.zeros(16, 32, dtype=torch.bool, device=device)
    mask_of_rows[(1,)](out, seed, threshold, first, 29, BLOCK_M=16, BLOCK=32)
    assert torch.equal(out[:, :29], dropout_mask(seed, threshold, first, 16, 29))


def test_scalars_may_lie_on_the_cpu(device):
    inputs = made((3, 7), dropout_p=0.2, device=device)
    ys = [fused(**{**inputs, "scaling": torch.tensor(1.5, dtype=d)}) for d in (torch.float32, torch.float64)]
    assert torch.equal(ys[0], ys[1]) and torch.equal(ys[0], fused(**{**inputs, "scaling": 1.5}))


def test_named_and_explained(device):
    inputs = made((3, 7), device=device)
    assert explain(routed_lora_linear, **inputs, backend="triton").backend == "triton"
    assert explain(routed_lora_linear, **inputs).backend == "aten", "nothing is measured, so auto leaves it alone"
    (entry,) = [b for b in info().backends["routed_lora"] if b.name == "triton"]
    assert entry.available and entry.reason
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()}
    with pytest.raises(ValueError, match="backend='triton' cannot run routed_lora: its kernels sum in fp32"):
        fused(**wide)


def test_runs_inside_a_compiled_graph(device):
    inputs = made((3, 7), dtypes="bf16+fp32", dropout_p=0.2, scaling=None, device=device)
    dy, names = dy_for(inputs), ("x", "lora_A", "lora_B", "routing")
    with launches() as ran:
        compiled = evaluate(torch.compile(fused, fullgraph=True, backend="aot_eager"), inputs, dy, names)
    assert "shrink_kernel" in ran
    assert all(torch.equal(t, compiled[k]) for k, t in evaluate(fused, inputs, dy, names).items())


def test_a_table_decides_and_the_default_stands_in():
    key = tiles.key_of("linear", 90, torch.bfloat16, 8192, 4096, 4096, 16, tma=True)
    tile = LinearTile(128, 128, 64)
    assert (
        tiles.look_up(key, {key: Tuned(tile, 1.0, 2.0)}) == tile
        and tiles.look_up(key, {}) == tiles.default(key) != tile
    )
    assert [tiles.bucket(M) for M in (0, 1, 16, 17, 32, 33, 8192, 8193, 10**6)] == [0, 0, 0, 1, 1, 2, 9, 10, 10]
    kinds = {"linear": LinearTile, "shrink": ShrinkTile, "reduce": ReduceTile}
    for op, kind in kinds.items():
        for capability in (tiles.INTERPRETER, 80, 90):
            for dtype in ("fp32", "bf16", "fp16"):
                assert all(type(tiles.default(Key(op, capability, dtype, 1, 1, r, b))) is kind
                           for r in (16, 256) for b in range(11))  # fmt: skip


def test_terms_share_a_read_within_256_ranks():
    ranks = [16, 5, 100, 256, 3, 130, 1]
    shared = [(list(chunk), block) for chunk, block in common.chunks(range(7), ranks)]
    assert shared == [([0, 1], 16), ([2], 128), ([3], 256), ([4], 16), ([5], 256), ([6], 16)]
