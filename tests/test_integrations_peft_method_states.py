"""Routed LoRA as a method of PEFT: the states that PEFT brings its layers into, and the hand-over between tasks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft_method import (
    CONV,
    KINDS,
    LINEAR,
    as_our_own,
    bits,
    call,
    config,
    layers,
    learning,
    of,
    randomized,
    routed,
    two,
)
from peft_models import Two
from torch import nn

from clora_kernels.integrations.peft import RoutedLoraConfig, next_task


def test_several_adapters() -> None:
    model = routed(config(), config(r=3, lora_alpha=1), config(r=5), dtype=torch.float64)
    x, _ = call(6, 5)
    assert learning(model) == of("first")
    base = two(torch.float64)(x)
    deltas = {}
    for name in ("first", "second", "third"):
        model.set_adapter(name)
        assert learning(model) == of(name)
        deltas[name] = model(x) - base
        expected = sum(as_our_own(layer, name)(x) for layer in layers(model).values())
        assert torch.equal(model(x), expected)
    model.base_model.set_adapter(["first", "third"])
    torch.testing.assert_close(model(x), base + deltas["first"] + deltas["third"])
    assert learning(model) == of("first") | of("third")
    model.delete_adapter("first")
    torch.testing.assert_close(model(x), base + deltas["third"])
    assert not [key for key in model.state_dict() if "first" in key]
    assert all("first" not in layer.scaling and "first" not in layer.lora_dropout for layer in layers(model).values())
    with model.disable_adapter():
        assert torch.equal(model(x), base) and not learning(model)
    assert learning(model) == of("third")


def test_adapters_of_other_layers() -> None:
    model = routed(config(target_modules=["linear"]), config(target_modules=["conv"]), dtype=torch.float64)
    x, _ = call(4)
    conv = model.get_submodule(CONV)
    assert torch.equal(conv(x), conv.base_layer(x)) and set(conv.lora_A) == {"second"}
    model.set_adapter("second")
    assert torch.equal(conv(x), as_our_own(conv, "second")(x))


@pytest.mark.parametrize("rows", [1024, 5])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_merged_and_back(safe, dtype, rows, monkeypatch) -> None:
    from clora_kernels.integrations.peft.routed_lora import layer as layer_module

    monkeypatch.setattr(layer_module, "MERGE_ROWS", rows)
    model = routed(config(), config(r=3), dtype=dtype)
    x, _ = call(6, dtype=dtype)
    base, y, before = two(dtype)(x), model(x), bits(model)
    own = {name: as_our_own(layer, "first") for name, layer in layers(model).items()}
    model.merge_adapter(safe_merge=safe)
    for name, layer in layers(model).items():
        own[name].merge()
        weight = layer.base_layer.weight
        assert layer.merged_adapters == ["first"] and not torch.equal(weight, before[f"{name}.base_layer.weight"])
        if rows == 1024:
            assert torch.equal(weight, own[name].weight)
        else:  # a product of fewer rows may add up in another order
            torch.testing.assert_close(weight, own[name].weight)
    assert torch.equal(model(x), sum(layer.base_layer(x) for layer in layers(model).values()))
    if dtype == torch.bfloat16:  # rounding of the weight is what is lost, as with PEFT
        return
    torch.testing.assert_close(model(x), y)
    with model.disable_adapter():  # as PEFT's: a disabled layer takes them out
        torch.testing.assert_close(model(x), base)
    assert not any(layer.merged for layer in layers(model).values())
    model.merge_adapter(["first", "second"], safe_merge=safe)
    assert all(layer.merged_adapters == ["first", "second"] for layer in layers(model).values())
    model.unmerge_adapter()
    assert not any(layer.merged for layer in layers(model).values())
    after = bits(model)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)


def test_merge_and_unload() -> None:
    model = routed(config(bias="none"), dtype=torch.float64)
    x, _ = call(6)
    y = model(x)
    plain = copy.deepcopy(model).unload()
    assert type(plain) is Two and torch.equal(plain(x), two(torch.float64)(x))
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is Two and merged.state_dict().keys() == two().state_dict().keys()
    torch.testing.assert_close(merged(x), y)


def test_a_merge_that_cannot_be_is_refused_and_nothing_happens() -> None:
    model = routed(config(), config(), dtype=torch.float64)
    with torch.no_grad():
        model.get_submodule(LINEAR).lora_routing["second"][0, 0] = float("inf")
    before = bits(model)
    with pytest.raises(ValueError, match=r"adapter_names: got \['first', 'second'\], .* not finite"):
        model.get_submodule(LINEAR).merge(safe_merge=True, adapter_names=["first", "second"])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    nn.utils.parametrizations.weight_norm(model.get_submodule(LINEAR).base_layer)
    with pytest.raises(ValueError, match="base_layer: got one into which no adapter can be merged exactly: Parametri"):
        model.get_submodule(LINEAR).merge()
    nn.utils.parametrize.remove_parametrizations(model.get_submodule(LINEAR).base_layer, "weight")
    assert not any(layer.merged for layer in layers(model).values())
    before.pop(f"{LINEAR}.base_layer.weight")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_the_hand_over_between_tasks(dtype) -> None:
    model = routed(config(), config(r=3), dtype=dtype)
    x, _ = call(6, dtype=dtype)
    y, before = model(x), bits(model)
    next_task(model)
    assert torch.equal(model(x), y)
    for layer in layers(model).values():
        _, _, R, R_old = layer.adapter_tensors("first")
        assert not R.any() and R.requires_grad and not R_old.requires_grad
    for name, tensor in model.state_dict().items():
        changed = "routing.first" in name
        assert torch.equal(tensor, before[name]) != changed, name
        if "frozen_routing.first" in name:
            assert torch.equal(tensor, before[name] + before[name.replace("frozen_routing", "routing")])
    assert (model.peft_config["first"].task, model.peft_config["second"].task) == (2, 1)
    next_task(model, "second")
    model.set_adapter("second")
    assert (model.peft_config["first"].task, model.peft_config["second"].task) == (2, 2)
    assert not any(layer.lora_routing["second"].any() for layer in layers(model).values())


def test_the_hand_over_of_a_merged_model() -> None:
    model = routed(config(), dtype=torch.float64)
    x, _ = call(6)
    y = model(x)
    model.merge_adapter()
    next_task(model)
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y)


def test_factors_of_the_first_task() -> None:
    model = routed(config(train_factors="first_task"), config(r=3))
    assert learning(model) == of("first")
    next_task(model)
    later = of("first", "lora_routing")
    assert learning(model) == later
    model.set_adapter("second")
    assert learning(model) == of("second")
    model.set_adapter("first")
    assert learning(model) == later
    with model.disable_adapter():
        pass
    assert learning(model) == later
    model.set_requires_grad("first")
    assert learning(model) == later
    again = copy.deepcopy(model)
    next_task(again)
    assert learning(again) == later and model.peft_config["first"].task == 2
    model.set_adapter("second")
    model.delete_adapter("first")
    model.add_adapter("first", config())
    model.set_adapter("first")
    assert learning(model) == of("first")


def test_what_has_no_adapter_has_no_next_task() -> None:
    with pytest.raises(ValueError, match="model: got Two without a routed layer of PEFT"):
        next_task(two())
    model = routed(config())
    before = bits(model)
    with pytest.raises(ValueError, match=r"adapter_name: got 'other' .* expected one of \['first'\]"):
        next_task(model, "other")
    assert model.peft_config["first"].task == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_copies() -> None:
    model = routed(config(lora_dropout=0.5), config(r=3, train_factors="first_task", task=2)).eval()
    x, _ = call(5, dtype=torch.float32)
    model.set_adapter("second")
    y, learns = model(x), learning(model)
    assert learns == of("second", "lora_routing")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), y) and learning(again) == learns
        assert again.peft_config == model.peft_config and again.peft_config["first"] is not model.peft_config["first"]
        randomized(again, 1)
        assert torch.equal(model(x), y) and not torch.equal(again(x), y)


def test_modules_and_biases_that_learn_too() -> None:
    model = get_peft_model(two(), RoutedLoraConfig(r=2, target_modules=["linear"], modules_to_save=["conv"]))
    own = {f"{LINEAR}.{kind}.default" for kind in KINDS[:3]}
    assert learning(model) == own | {f"{CONV}.modules_to_save.default.{n}" for n in ("weight", "bias")}
    model = get_peft_model(two(), RoutedLoraConfig(r=2, target_modules=["linear"], bias="lora_only"))
    assert learning(model) == own | {f"{LINEAR}.base_layer.bias"}
    assert "base_model.model.linear.base_layer.bias" in get_peft_model_state_dict(model)
    model = get_peft_model(two(), RoutedLoraConfig(r=2, target_modules=["linear"], bias="all"))
    assert learning(model) == own | {f"{LINEAR}.base_layer.bias", f"{CONV}.bias"}
