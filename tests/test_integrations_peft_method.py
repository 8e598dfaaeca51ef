"""Routed LoRA as a method of PEFT: what its layers compute."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from peft_method import CONV, LINEAR, K, as_our_own, call, config, layers, learning, of, routed, two
from torch import nn


@pytest.mark.parametrize("name", [LINEAR, CONV])
@pytest.mark.parametrize("lead", [(5,), (3, 4), (0,)])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_a_layer_computes_what_the_package_s_own_does(name, lead, p, dtype) -> None:
    """To the bit, every gradient too; the base's output is taken apart in the next test."""
    model = routed(config(lora_dropout=p), dtype=dtype).train()
    layer = model.get_submodule(name)
    own = as_our_own(layer, "first")
    results = []
    for module in (layer, own):
        torch.manual_seed(5)
        x, dy = call(*lead, dtype=dtype)
        y = module(x.requires_grad_())
        y.backward(dy)
        results.append((y, x.grad))
    A, B, R, R_old = layer.adapter_tensors("first")
    assert R_old.grad is None and not R_old.requires_grad and own.routing is not None
    assert A.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in ((A, own.lora_A), (B, own.lora_B), (R, own.routing)):
        assert torch.equal(ours.grad, theirs.grad)
        assert ours.grad.any() or lead == (0,)


@pytest.mark.parametrize("name", [LINEAR, CONV])
def test_the_formula(name) -> None:
    model = routed(config(use_rslora=True), dtype=torch.float64)
    layer = model.get_submodule(name)
    x, dy = call(6)
    A, B, R, R_old = layer.adapter_tensors("first")
    s, base = 6 / 4**0.5, layer.base_layer(x)
    torch.testing.assert_close(layer(x), base + s * x @ A.mT @ (R_old + R) @ B.mT)
    dA, dB, dR = torch.autograd.grad(layer(x), (A, B, R), dy)
    torch.testing.assert_close(dA, s * (x.mT @ (dy @ B @ R.mT)).mT)  # through R alone
    torch.testing.assert_close(dB, s * (R.mT @ (x @ A.mT).mT @ dy).mT)
    torch.testing.assert_close(dR, s * (x @ A.mT).mT @ dy @ B)


@pytest.mark.parametrize("how", ["hooked", "another class", "further arguments"])
def test_a_base_that_is_no_plain_linear_layer_is_called(how) -> None:
    class Scaled(nn.Linear):
        def forward(self, x, times=3):
            return times * super().forward(x)

    model = routed(config(), dtype=torch.float64)
    layer = model.get_submodule(LINEAR)
    x, _ = call(5)
    A, B, R, R_old = layer.adapter_tensors("first")
    delta, plain, options = 1.5 * x @ A.mT @ (R_old + R) @ B.mT, layer.base_layer(x), {}
    if how == "hooked":
        layer.base_layer.register_forward_hook(lambda m, args, y: 3 * y)
    else:
        layer.base_layer.__class__ = Scaled
        options = {} if how == "another class" else {"times": 3}
    torch.testing.assert_close(layer(x, **options), 3 * plain + delta)
    assert torch.autograd.grad(layer(x, **options).sum(), layer.lora_routing["first"])[0].any()


def test_further_arguments_are_not_dropped() -> None:
    with pytest.raises(TypeError, match="times"):
        routed(config()).get_submodule(LINEAR)(call(5, dtype=torch.float32)[0], times=3)


def test_starts() -> None:
    x, _ = call(5)
    plain = two(torch.float64)
    expected = plain(x)
    for init in ("identity", "c-lora"):
        model = get_peft_model(copy.deepcopy(plain), config(routing_init=init, r=64))
        for layer in layers(model).values():
            A, B, R, R_old = layer.adapter_tensors("default")
            assert not R_old.any() and A.std() > 0 and A.abs().max() <= K**-0.5
            assert torch.equal(R, torch.eye(64).double() if init == "identity" else torch.zeros(64, 64).double())
            assert abs(B.std() - (0 if init == "identity" else 1 / 8)) < 0.01
        torch.testing.assert_close(model(x), expected)
        assert learning(model) == of("default")


@pytest.mark.parametrize("training", [False, True])
def test_compiled_whole(training) -> None:
    model = routed(config(lora_dropout=0.3), config(r=3)).train(training)
    model.base_model.set_adapter(["first", "second"])
    x, _ = call(6, dtype=torch.float32)
    results = []
    for compute in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(2)
        y = compute(x)
        results.append((y, *torch.autograd.grad(y.sum(), [p for p in model.parameters() if p.requires_grad])))
    assert len(results[0]) == 13
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours)


def test_ranks_and_alphas_by_layer() -> None:
    model = routed(config(rank_pattern={"conv": 7}, alpha_pattern={"linear": 1}))
    linear, conv = (model.get_submodule(name) for name in (LINEAR, CONV))
    assert (linear.lora_A["first"].shape, conv.lora_A["first"].shape) == ((4, K), (7, K))
    assert (linear.scaling["first"], conv.scaling["first"]) == (1 / 4, 6 / 7)
    assert conv.lora_routing["first"].shape == conv.lora_frozen_routing["first"].shape == (7, 7)


def dropped(model: nn.Module, name: str) -> torch.Tensor:
    """[4096]: by how much the adapter counts each element of x, where it is the identity on one."""
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        A, B, R, R_old = layer.adapter_tensors("first")
        for tensor in (A, B, R, R_old):
            tensor.zero_()
        A[0, 0] = R_old[0, 0] = 1.0
        B[:, 0] = 1.0
    return layer(torch.ones(4096, K))[:, 0] / layer.scaling["first"]


@pytest.mark.parametrize("name", [LINEAR, CONV])
def test_dropout(name) -> None:
    model = routed(config(lora_dropout=0.25)).train()
    counted, again = dropped(model, name), dropped(model, name)
    kept = counted != 0
    torch.testing.assert_close(counted[kept], torch.full_like(counted[kept], 4 / 3))
    # Five standard deviations of a count of 4096 draws.
    assert abs(kept.double().mean() - 0.75) < 5 * (0.25 * 0.75 / 4096) ** 0.5
    assert not torch.equal(counted, again) and (dropped(model.eval(), name) == 1).all()


def test_dtypes_are_those_of_peft() -> None:
    for autocast, adapter in ((True, torch.float32), (False, torch.bfloat16)):
        model = routed(config(), config(), dtype=torch.bfloat16, autocast_adapter_dtype=autocast)
        for layer in layers(model).values():
            assert {t.dtype for name in ("first", "second") for t in layer.adapter_tensors(name)} == {adapter}
        assert learning(model) == of("first"), "those of an adapter that is not active do not learn"
        x, _ = call(5, dtype=torch.bfloat16)
        assert model(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert routed(config())(x.float()).dtype == torch.bfloat16


def test_batches_of_several_adapters_are_refused() -> None:
    model = routed(config(), config())
    with pytest.raises(ValueError, match=r"adapter_names: got \['first', 'second'\], expected None"):
        model(call(2, dtype=torch.float32)[0], adapter_names=["first", "second"])


def test_an_adapter_on_another_device_is_named() -> None:
    model = routed(config())
    layer = model.get_submodule(LINEAR)
    layer.lora_routing["first"] = nn.Parameter(layer.lora_routing["first"].to("meta"))
    with pytest.raises(ValueError, match="routing: got device meta, expected cpu, the device of x"):
        layer(call(2, dtype=torch.float32)[0])
