"""The Triton kernels of routed LoRA: on the GPU if there is one, else under Triton's interpreter on small shapes."""

from __future__ import annotations

import pytest
import torch
from strategies import DIFFERENTIABLE, DTYPES, dy_for, fused, laid_out, made, tensors_of
from test_routed_lora_group import LEARNING, group, joined, run

from clora_kernels.reference.dropout_mask import dropout_mask
from clora_kernels.reference.routed_lora_samples import sample_inputs
from clora_kernels.testing import (
    assert_fidelity,
    assert_parity,
    dispatched,
    evaluate,
    guarded_outputs,
    launches,
    poisoned_empty,
    saved_tensors,
    unchanged,
)

pytest.importorskip("triton", reason="the kernels are Triton's")

from clora_kernels.kernels.routed_lora.tiles import LinearTile, ReduceTile, ShrinkTile
from clora_kernels.kernels.routed_lora.triton import common

SAMPLES = [name for name, _ in sample_inputs()]
TYPES = ["fp32", "bf16", "fp16", "bf16+fp32"]


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
    "several a multiprocessor": {"linear": LinearTile(32, 32, 32, per_sm=3)},
    "split": {"shrink": ShrinkTile(16, 16, least_steps=1), "reduce": ReduceTile(16, 16, least_steps=1)},
}


@pytest.mark.parametrize("K, N", [(96, 40), (87, 43)])
@pytest.mark.parametrize("tile", TILES)
def test_tiles(device, with_tiles, tile, K, N):
    """Each with several blocks in every direction, by descriptors where sizes allow them, and by pointers."""
    with_tiles(**TILES[tile])
    inputs = made((3, 17), K, N, 17, dtypes="bf16+fp32", frozen=True, gate=(17,), dropout_p=0.3, device=device)
    with launches() as names:
        assert_parity(fused, inputs, dy=dy_for(inputs))
    described = K == 96 and common.capability(inputs["x"]) != 80
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


SMALL = [(options, "bf16+fp32", 1e-3) for options in FIDELITY]


@pytest.mark.parametrize(
    "options, dtypes, strength", [*SMALL, ("plain", "fp16+fp32", 1e-3), ("routed", "bf16+fp32", 1.0)]
)
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


def test_adapter_comes_through_whole_by_descriptors(device, with_tiles):
    if device.type == "cpu":
        with_tiles(LinearTile(128, 128, 64), ShrinkTile(128, 64))
    inputs = made((4, 100), 192, 272, 16, dtypes="bf16+fp32", strength=1e-3, device=device)
    assert_fidelity(fused(**inputs), **inputs)


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
    assert ("reduce_kernel" in names) == bool(
        {"lora_A", "lora_B", "scaling", *(() if bank else ("routing",))} & {*wanted}
    )
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
        with_tiles(LinearTile(32, 32, 32), ShrinkTile(32, 32), ReduceTile(32, 32))
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
