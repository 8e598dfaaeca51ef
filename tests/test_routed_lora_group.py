"""Several layers of one x: each equals itself alone, dx is one sum, what is not used costs nothing."""

from __future__ import annotations

import pytest
import torch
from strategies import DTYPES, dy_for

from clora_kernels import RoutedLoRA, dropout_mask, routed_lora_linear, routed_lora_linear_group
from clora_kernels.kernels.routed_lora import aten
from clora_kernels.reference import routed_lora as reference
from clora_kernels.reference.routed_lora_samples import make_inputs
from clora_kernels.testing import assert_fidelity, assert_parity, compare, dispatched

RANKS, OUTPUTS = (5, 3, 8), (29, 17, 61)
LEARNING = ("lora_A", "lora_B", "routing", "bias")


def group(device, dtypes="fp32", lead=(3, 7), strength=1.0, **options):
    """x and the arguments of three layers of it, each of another rank and width."""
    dtype, adapter_dtype = DTYPES[dtypes]
    layers = []
    for seed, (r, N) in enumerate(zip(RANKS, OUTPUTS, strict=True)):
        chosen = {"dtype": dtype, "adapter_dtype": adapter_dtype, "strength": strength, "device": device, **options}
        layers.append(make_inputs(lead, 41, N, r, **chosen, seed=seed))
        x = layers[0]["x"]
    layers = [{**layer, "x": x} for layer in layers]
    dys = [torch.randn(*lead, N, generator=torch.Generator().manual_seed(N)).to(dtype).to(device) for N in OUTPUTS]
    return x, layers, dys


def run(x, layers, dys, wanted=LEARNING, backend="auto"):
    """ys, dx and a dict of gradients for each layer."""
    x = x.detach().requires_grad_()
    leaves = [{k: v for k, v in layer.items() if k != "x"} for layer in layers]
    leaves = [{k: v.detach().requires_grad_() if k in wanted else v for k, v in leaf.items()} for leaf in leaves]
    ys = routed_lora_linear_group(x, [RoutedLoRA(**leaf) for leaf in leaves], backend=backend)
    flat = [leaf[k] for leaf in leaves for k in wanted]
    dx, *grads = torch.autograd.grad(ys, [x, *flat], dys)
    return ys, dx, [dict(zip(wanted, grads[i * len(wanted) :], strict=False)) for i in range(len(layers))]


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16+fp32", "fp16+fp32", "fp64"])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}, {"frozen": True, "gate": (3, 1, 1)}, {"bank": 2}])
def test_each_layer_is_itself_alone(device, mask_path, dtypes, options):
    x, layers, dys = group(device, dtypes, **options)
    with dispatched() as calls:
        ys, _, grads = run(x, layers, dys)
    assert calls.count("routed_lora.aten.shrink") == 4, "x is read once, each dy once"
    assert calls.count("routed_lora.aten.linear") == 4, "each y, and one dx"
    for layer, y, dy, of_layer in zip(layers, ys, dys, grads, strict=True):
        assert_parity({"y": y.detach(), **of_layer}, layer, dy=dy, gradients=LEARNING)


def joined(x, layers):
    """One layer that computes the outputs of all side by side: weights stacked, the small matrices block-diagonal."""
    stacked = {k: torch.cat([layer[k] for layer in layers]) for k in ("weight", "lora_A", "bias")}
    blocks = {k: torch.block_diag(*[layer[k] for layer in layers]) for k in ("lora_B", "routing")}
    return {"x": x, **stacked, **blocks, "scaling": layers[0]["scaling"]}


SUMS = [*(("aten", dtypes) for dtypes in DTYPES), ("reference", "fp32"), ("reference", "fp64")]


@pytest.mark.parametrize("backend, dtypes", SUMS)
def test_dx_is_summed_unrounded_and_rounded_once(device, dtypes, backend):
    x, layers, dys = group(device, dtypes, lead=(50, 7))
    ys, dx, _ = run(x, layers, dys, backend=backend)
    results = {"y": torch.cat(ys, -1).detach(), "x": dx}
    assert_parity(results, joined(x, layers), dy=torch.cat(dys, -1), gradients=["x"])


def test_dx_with_a_draw_for_each_layer(device):
    x, layers, dys = group(device, "fp32", dropout_p=0.4)
    _, dx, _ = run(x, layers, dys)
    names = ("x", "weight", *LEARNING)
    widened = [{k: v.double() if k in names else v for k, v in layer.items()} for layer in layers]
    absolute = [{k: v.abs() if k in names else v for k, v in layer.items()} for layer in widened]

    def summed(arguments, convert):
        return sum(reference.backward(convert(dy), **a).x for dy, a in zip(dys, arguments, strict=True))

    truth, magnitude = summed(widened, lambda dy: dy.double()), summed(absolute, lambda dy: dy.double().abs())
    deviation = compare(dx, truth, summed(layers, lambda dy: dy), magnitude, torch.float32)
    assert deviation.ok, str(deviation)


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_small_adapters_come_through_whole(device, strength):
    x, layers, _ = group(device, "bf16+fp32", lead=(20, 100), strength=strength)
    ys = routed_lora_linear_group(x, [RoutedLoRA(**{k: v for k, v in la.items() if k != "x"}) for la in layers])
    for layer, y in zip(layers, ys, strict=True):
        assert_fidelity(y, **layer)


def test_each_layer_draws_its_own_mask(device):
    x, layers, _ = group(device, dropout_p=0.5)
    replay = {k: v for k, v in layers[0].items() if k != "x"}
    same = RoutedLoRA(**{**replay, "dropout_seed": None})
    one, other = routed_lora_linear_group(x, [same, same])
    assert not torch.equal(one, other)
    one, other = routed_lora_linear_group(x, [RoutedLoRA(**replay)] * 2)
    assert torch.equal(one, other)
    for y in routed_lora_linear_group(x, [same, same], training=False):
        assert_parity({"y": y}, {**layers[0], "dropout_p": 0.0})


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (2,)])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
def test_outputs_that_nothing_uses(device, used, dtypes):
    """Their layers get no gradient, or zero, and dx is that of the others."""
    x, layers, dys = group(device, dtypes)
    x = x.requires_grad_()
    for layer in layers:
        layer["lora_A"].requires_grad_()
    ys = routed_lora_linear_group(x, [RoutedLoRA(**{k: v for k, v in la.items() if k != "x"}) for la in layers])
    torch.autograd.backward([ys[i] for i in used], [dys[i] for i in used])
    for i, layer in enumerate(layers):
        grad = layer["lora_A"].grad
        assert grad.any() if i in used else grad is None or not grad.any()
    chosen = [{k: v.detach() if torch.is_tensor(v) else v for k, v in layers[i].items()} for i in used]
    arguments = joined(x.detach(), chosen)
    y = reference.forward(**arguments)
    assert_parity({"y": y, "x": x.grad}, arguments, dy=torch.cat([dys[i] for i in used], -1), gradients=["x"])


def test_a_group_of_one_is_the_layer(device):
    x, layers, _ = group(device, "bf16+fp32")
    (y,) = routed_lora_linear_group(x, [RoutedLoRA(**{k: v for k, v in layers[0].items() if k != "x"})])
    assert torch.equal(y, routed_lora_linear(**layers[0]))


def test_without_rows(device):
    x, layers, dys = group(device, lead=(0, 7))
    ys, dx, grads = run(x, layers, dys)
    assert [tuple(y.shape) for y in ys] == [(0, 7, N) for N in OUTPUTS] and dx.shape == x.shape
    assert all(not g.any() for of_layer in grads for g in of_layer.values())


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dx_in_16_bit_errs_as_one_rounding_does(device, mask_path, p):
    """Parity leaves room for a second rounding; the root mean square of many elements does not."""
    x = torch.randn(64, 96, device=device).bfloat16()
    layers, dys = [], [torch.randn(64, 80, device=device).bfloat16() for _ in range(4)]
    for j in range(4):
        small = {"lora_A": torch.randn(4, 96, device=device), "lora_B": torch.randn(80, 4, device=device) * 0.1}
        seed = torch.tensor(j, device=device)
        weight = torch.randn(80, 96, device=device).bfloat16()
        layers.append({"x": x, "weight": weight, **small, "dropout_p": p, "dropout_seed": seed})
    _, dx, _ = run(x, layers, dys, wanted=("lora_A",))
    exact = torch.zeros(64, 96, dtype=torch.float64, device=device)
    for layer, dy in zip(layers, dys, strict=True):
        A, B = (layer[name].bfloat16().double() for name in ("lora_A", "lora_B"))
        h = ((dy.double() @ B).float() / (1 - p)).bfloat16().double() if p else dy.double() @ B
        exact += dy.double() @ layer["weight"].double() + dropout_mask(x, p, layer["dropout_seed"]) * (h @ A)
    error, once = (t.double() - exact for t in (dx, exact.bfloat16()))
    assert error.square().mean().sqrt() < 1.15 * once.square().mean().sqrt()


def test_dx_in_16_bit_in_blocks_of_columns(device, monkeypatch):
    x, layers, dys = group(device, "bf16+fp32")
    widened = [{**layer, "x": x.new_zeros(3, 7, 200)} for layer in layers]
    for layer in widened:
        layer["weight"] = torch.randn(layer["weight"].shape[0], 200, device=device).bfloat16()
        layer["lora_A"] = torch.randn(layer["lora_A"].shape[0], 200, device=device)
    monkeypatch.setitem(aten.SCRATCH_BYTES, "cuda", 1)
    ys, dx, _ = run(widened[0]["x"], widened, dys)
    results = {"y": torch.cat(ys, -1).detach(), "x": dx}
    assert_parity(results, joined(widened[0]["x"], widened), dy=torch.cat(dys, -1), gradients=["x"])


@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
def test_layers_of_different_options(device, mask_path, dtypes):
    """A plain layer before one with a gate and one with dropout: none is computed as its neighbour is."""
    dtype, adapter_dtype = DTYPES[dtypes]
    made = {"dtype": dtype, "adapter_dtype": adapter_dtype, "device": device, "routing": False}
    layers = [
        make_inputs(**made, seed=i, **options) for i, options in enumerate(({}, {"gate": (5,)}, {"dropout_p": 0.3}))
    ]
    x = layers[0]["x"]
    layers = [{**layer, "x": x} for layer in layers]
    dys = [dy_for(layer) for layer in layers]
    ys, _, grads = run(x, layers, dys, wanted=("lora_A", "lora_B"), backend="aten")
    for layer, y, dy, of_layer in zip(layers, ys, dys, grads, strict=True):
        assert_parity({"y": y.detach(), **of_layer}, layer, dy=dy, gradients=("lora_A", "lora_B"))
