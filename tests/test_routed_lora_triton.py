"""The Triton kernels of routed LoRA: on the GPU if there is one, else under Triton's interpreter on small shapes."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from strategies import DIFFERENTIABLE, DTYPES, LAYOUTS, call, dy_for, laid_out, tensors_of
from test_routed_lora_group import LEARNING, group, joined, run

from clora_kernels import explain, info, routed_lora_linear
from clora_kernels.kernels.routed_lora.algebra import Dropout, Term
from clora_kernels.reference.dropout_mask import dropout_mask
from clora_kernels.reference.routed_lora_samples import make_inputs, sample_inputs
from clora_kernels.testing import (
    assert_fidelity,
    assert_parity,
    dispatched,
    evaluate,
    guarded,
    guarded_outputs,
    launches,
    poisoned_empty,
    saved_tensors,
    unchanged,
)

pytest.importorskip("triton", reason="the kernels are Triton's")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from clora_kernels.kernels.routed_lora import triton as kernels  # noqa: E402
from clora_kernels.kernels.routed_lora.triton import common, tiles  # noqa: E402
from clora_kernels.kernels.routed_lora.triton.tiles import Key, LinearTile, ReduceTile, ShrinkTile  # noqa: E402

SAMPLES = [name for name, _ in sample_inputs()]
TYPES = ["fp32", "bf16", "fp16", "bf16+fp32"]
fused = partial(call, backend="triton")


def made(*sizes, dtypes="fp32", **options):
    dtype, adapter_dtype = DTYPES[dtypes]
    return make_inputs(*sizes, dtype=dtype, adapter_dtype=adapter_dtype, **options)


@pytest.fixture
def with_tiles(monkeypatch):
    """Makes the kernels run with the given tiles, whatever the call."""

    def use(linear=None, shrink=None, reduce=None):
        chosen, before = {"linear": linear, "shrink": shrink, "reduce": reduce}, tiles.default
        monkeypatch.setattr(tiles, "default", lambda key: chosen[key.op] or before(key))

    return use


@pytest.mark.parametrize("dtypes", TYPES)
@pytest.mark.parametrize("name", SAMPLES)
def test_samples(device, name, dtypes):
    """Every option; inputs and saved tensors unchanged, no unwritten memory read, the intended kernels launched."""
    inputs = dict(sample_inputs(*DTYPES[dtypes], device=device))[name]
    dy, bank = dy_for(inputs), inputs.get("routing_index") is not None
    with unchanged(dy, *tensors_of(inputs)), poisoned_empty(), saved_tensors(), launches() as names:
        assert_parity(fused, inputs, dy=dy)
    assert names[:2] == ["pack_kernel", "shrink_kernel" if dy[..., :1].numel() else "pack_kernel"]
    if dy.numel():
        assert sum(name in ("linear_kernel", "linear_tma_kernel") for name in names) == 2, "y and dx, one launch each"
        assert names.count("reduce_kernel") == 2, "dA and U, one launch each"
        assert names.count("shrink_kernel") == 2, "x and dy are read once, C_live beside C"
    assert ("unpack_B_kernel" in names) == (not bank)


@pytest.mark.parametrize("name", ["everything", "bank_frozen", "strided", "rank_1", "delta_onto_fp32_base", "no_lead"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
def test_nothing_is_written_beyond_an_output(device, name, dtypes):
    inputs = dict(sample_inputs(*DTYPES[dtypes], device=device))[name]
    with guarded_outputs() as outputs, dispatched() as calls:
        assert_parity(fused, inputs, dy=dy_for(inputs))
    assert len(outputs) > 8 and calls and all(call.startswith("routed_lora.triton.") for call in calls)


SIZES = [
    ((1,), 65, 33, 4),
    ((7,), 33, 65, 12),
    ((1,), 200, 7, 1),
    ((5, 7), 7, 100, 24),
    ((2, 3), 70, 45, 96),
    ((3,), 21, 19, 256),
    ((4, 8), 64, 48, 16),
]


@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32", "fp16"])
@pytest.mark.parametrize("lead, K, N, r", SIZES)
def test_sizes(device, lead, K, N, r, dtypes):
    options = {"frozen": True, "gate": (r,), "scaling": None, "dropout_p": 0.2, "device": device}
    inputs = made(lead, K, N, r, dtypes=dtypes, **options)
    assert_parity(fused, inputs, dy=dy_for(inputs))


TILES = {
    "default": {},
    "wide": {"linear": LinearTile(16, 64, 32, group_m=1), "shrink": ShrinkTile(32, 16, most_splits=1)},
    "tall": {"linear": LinearTile(64, 16, 16, group_m=3), "reduce": ReduceTile(16, 64, most_splits=1)},
    "flattened": {"linear": LinearTile(32, 32, 32, flatten=True, per_sm=3)},
    "split": {"shrink": ShrinkTile(16, 16, least_steps=1), "reduce": ReduceTile(16, 16, least_steps=1)},
}


@pytest.mark.parametrize("K, N", [(128, 72), (111, 75)])
@pytest.mark.parametrize("tile", TILES)
def test_tiles(device, with_tiles, tile, K, N):
    """Each with several blocks in every direction, by descriptors where sizes allow them, and by pointers."""
    with_tiles(**TILES[tile])
    inputs = made((3, 23), K, N, 17, dtypes="bf16+fp32", frozen=True, gate=(17,), dropout_p=0.3, device=device)
    with launches() as names:
        assert_parity(fused, inputs, dy=dy_for(inputs))
    described = K == 128 and common.capability(inputs["x"]) != 80
    assert names.count("linear_tma_kernel" if described else "linear_kernel") == 2
    if tile == "split":
        assert "shrink_sums_kernel" in names and "reduce_sums_kernel" in names
    if tile == "wide":
        assert "shrink_sums_kernel" not in names
    if tile == "tall":
        assert "reduce_sums_kernel" not in names


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtypes", ["fp32", "fp16+fp32"])
def test_descriptors_read_a_weight_of_either_layout(device, dtypes, transposed):
    inputs = made((40,), 48, 40, 4, dtypes=dtypes, routing=False, device=device)
    inputs["weight"] = laid_out(inputs["weight"], "transposed" if transposed else "contiguous")
    with launches() as names:
        assert_parity(fused, inputs, dy=dy_for(inputs))
    assert names.count("linear_tma_kernel") == (0 if common.capability(inputs["x"]) == 80 else 2)


FIDELITY = {
    "plain": {"routing": False},
    "routed": {"frozen": True, "gate": (4, 1, 7)},
    "bank": {"bank": 3},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("strength", [1e-3, 1.0])
@pytest.mark.parametrize("dtypes", ["bf16+fp32", "fp16+fp32"])
@pytest.mark.parametrize("options", FIDELITY)
def test_adapter_comes_through_whole(device, with_tiles, options, dtypes, strength):
    """An adapter of 1e-3 of y, which a sum rounded twice halves, and one as large as x·W; also alone, with W = 0."""
    if device.type == "cpu":
        with_tiles(LinearTile(128, 128, 64), ShrinkTile(128, 64))
    inputs = made((4, 100), 193, 271, 7, dtypes=dtypes, **FIDELITY[options], strength=strength, device=device)
    assert_fidelity(fused(**inputs), **inputs)
    inputs = {**inputs, "weight": torch.zeros_like(inputs["weight"]), "bias": None}
    y = fused(**inputs)
    assert_fidelity(y, **inputs)
    assert_parity({"y": y}, inputs)


def test_adapter_comes_through_whole_in_dx(device, with_tiles):
    if device.type == "cpu":
        with_tiles(LinearTile(128, 128, 64), ShrinkTile(128, 64))
    inputs = made((4, 100), 271, 193, 7, dtypes="bf16+fp32", strength=1e-3, gate=(7,), device=device)
    x, dy = inputs["x"].requires_grad_(), dy_for(inputs)
    (dx,) = torch.autograd.grad(fused(**inputs), x, dy)
    C = inputs["scaling"] * inputs["routing"].double() @ inputs["lora_B"].double().mT
    assert_fidelity(dx, dy, inputs["weight"].mT, C, inputs["lora_A"].mT, gate=inputs["gate"])


@pytest.mark.parametrize("bank", [0, 2])
@pytest.mark.parametrize("wanted", [*((name,) for name in DIFFERENTIABLE[:-1]), ("routing", "gate"), ("x", "lora_B")])
def test_gradients_one_by_one(device, wanted, bank):
    """Each comes as in the whole, bit for bit, and nothing that it does not need runs."""
    inputs = made((3, 7), bank=bank, frozen=True, gate=(3, 1, 5), scaling=None, dropout_p=0.25, device=device)
    dy = dy_for(inputs)
    whole = evaluate(fused, inputs, dy, DIFFERENTIABLE[:-1])
    with launches() as names:
        some = evaluate(fused, inputs, dy, wanted)
    assert all(torch.equal(some[name], whole[name]) for name in wanted)
    assert ("reduce_kernel" in names) == bool({"lora_A", "lora_B", "scaling", *(() if bank else ("routing",))} & {*wanted})
    assert sum(name.startswith("linear") for name in names) == 1 + ("x" in wanted)
    assert ("unpack_B_kernel" in names) == ("lora_B" in wanted and not bank)
    assert ("unpack_scaling_kernel" in names) == ("scaling" in wanted and not bank)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}, {"frozen": True, "gate": (3, 1, 1)}, {"bank": 2}])
def test_groups(device, dtypes, options):
    x, layers, dys = group(device, dtypes, **options)
    with launches() as names:
        ys, dx, grads = run(x, layers, dys, backend="triton")
    assert names.count("shrink_kernel") == 4, "x is read once, each dy once"
    assert sum(name.startswith("linear") for name in names) == 4, "each y, and one dx"
    for layer, y, dy, of_layer in zip(layers, ys, dys, grads, strict=True):
        assert_parity({"y": y.detach(), **of_layer}, layer, dy=dy, gradients=LEARNING)
    if not options:
        results = {"y": torch.cat(ys, -1).detach(), "x": dx}
        assert_parity(results, joined(x, layers), dy=torch.cat(dys, -1), gradients=["x"])


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("layers", [2, 3, 5])
def test_dx_of_a_group_is_rounded_once(device, with_tiles, p, layers):
    """Two and three layers by descriptors, five by pointers; ranks that share one read and ranks that do not."""
    if device.type == "cpu":
        with_tiles(LinearTile(32, 48 if layers == 9 else 32, 32), ShrinkTile(32, 32), ReduceTile(32, 32))
    inputs = [made((33,), 48, 40, 4 + 60 * j, dtypes="bf16+fp32", routing=False, seed=j) for j in range(layers)]
    inputs = [{**layer, "x": inputs[0]["x"], "dropout_p": p, "dropout_seed": torch.tensor(7 * j)}
              for j, layer in enumerate(inputs)]  # fmt: skip
    inputs = [{k: v.to(device) if torch.is_tensor(v) else v for k, v in layer.items()} for layer in inputs]
    dys = [dy_for(layer, seed=j) for j, layer in enumerate(inputs)]
    with launches() as names:
        _, dx, _ = run(inputs[0]["x"], inputs, dys, wanted=("lora_A",), backend="triton")
    described = layers <= 3 and common.capability(dx) != 80
    assert names.count("linear_tma_kernel" if described else "linear_kernel") >= 1
    exact = torch.zeros(33, 48, dtype=torch.float64, device=device)
    for layer, dy in zip(inputs, dys, strict=True):
        A, C = layer["lora_A"].bfloat16().double(), (layer["lora_B"].mT * layer["scaling"]).bfloat16().double()
        h = ((dy.double() @ C.mT).float() / (1 - p)).bfloat16().double()
        kept = 1.0 if p == 0 else dropout_mask(layer["dropout_seed"], torch.tensor(32768, device=device), 0, 33, 48)
        exact += dy.double() @ layer["weight"].double() + kept * (h @ A)
    error, once = (t.double() - exact for t in (dx, exact.bfloat16()))
    assert error.square().mean().sqrt() < 1.15 * once.square().mean().sqrt()


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
    inputs = made((5, 7), 90, 150, 6, dtypes="bf16+fp32", **{**OPTIONS, "gate": (6,)}, device=device)
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
    assert tiles.look_up(key, {key: tile}) == tile and tiles.look_up(key, {}) == tiles.default(key) != tile
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
