"""inject: layers that stand in several places, and input it refuses by name."""

import re

import pytest
import torch
from torch import nn

import clora_kernels as ck
from clora_kernels import RoutedLoRALinear


def lora(linear):
    return RoutedLoRALinear.from_linear(linear, 3)


def unchanged(model):
    return list(model.modules())


def test_a_layer_in_two_places_is_replaced_in_both_whichever_is_named():
    linear, made = nn.Linear(4, 4), []
    model = nn.ModuleDict({"a": linear, "b": linear})
    report = ck.inject(model, lambda layer: made.append(lora(layer)) or made[-1], iter(["a"]))
    assert report.swapped == ["a", "b"] and report.unmatched == [] and made == [model["a"]]
    assert model["a"] is model["b"] and isinstance(model["b"], RoutedLoRALinear)


@pytest.mark.parametrize("targets", [["0.up"], ["1.up"], r"1\..*"], ids=str)
def test_each_path_into_a_shared_block_names_its_layers(targets):
    block = nn.ModuleDict({"up": nn.Linear(4, 4)})
    model = nn.Sequential(block, block)
    report = ck.inject(model, lora, targets)
    assert set(report.swapped) == {"0.up", "1.up"} and report.unmatched == []
    assert isinstance(block["up"], RoutedLoRALinear)
    assert ck.extract(model).keys() == {"0.up"} and type(block["up"]) is nn.Linear


def test_a_layer_that_must_stay_in_one_place_stays_in_all():
    encoder = nn.TransformerEncoderLayer(8, 2, 8)
    model = nn.ModuleDict({"encoder": encoder, "head": encoder.linear1})
    with pytest.raises(ValueError, match=r"encoder\.linear1 was left alone: .*inference path"):
        ck.inject(model, lora, ["head"])
    assert model["head"] is encoder.linear1 and type(model["head"]) is nn.Linear


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([0], TypeError, r"targets\[0\]: got int, expected a name"),
        (["0", re.compile("0")], TypeError, r"targets\[1\]: got Pattern, expected a name; an expression stands alone"),
        ("(", ValueError, r"targets: got '\(', expected a regular expression: missing \)"),
    ],
    ids=str,
)
def test_targets_of_another_kind(targets, error, message):
    model = nn.Sequential(nn.Linear(4, 4))
    before = unchanged(model)
    with pytest.raises(error, match=message):
        ck.inject(model, lora, targets)
    assert unchanged(model) == before


def test_what_is_no_model_and_what_is_no_factory():
    for act in (lambda m: ck.inject(m, lora, ["0"]), ck.extract, ck.merge_all, ck.freeze_base, ck.to_lora):
        with pytest.raises(TypeError, match=r"model: got list, expected an nn\.Module"):
            act([nn.Linear(4, 4)])
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"factory: got int, expected a function"):
        ck.inject(model, 3, ["0"])
    assert type(model[0]) is nn.Linear


def test_a_model_that_is_itself_a_linear_layer():
    with pytest.raises(ValueError, match="itself a linear layer and can only be swapped within a model"):
        ck.inject(nn.Linear(4, 4), lora, ["weight"])


def test_a_weight_of_8_bits_is_left_alone():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    report = ck.inject(model, lora, ["0", "1"])
    assert report.swapped == ["1"] and "torch.float8_e4m3fn" in dict(report.left)["0"]


def test_flags_set_on_merged_layers_are_those_of_the_unmerged():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ck.inject(model, lora, ["0", "1"])
    model.eval()
    ck.merge_all(model)
    assert model[0].weight.requires_grad and model[1].weight.requires_grad
    trainable = ck.freeze_base(model)
    ck.unmerge_all(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert not any(name.endswith(("weight", "bias")) for name in trainable)
    ck.merge_all(model)
    model[0].requires_grad_(True)
    ck.unmerge_all(model)
    assert model[0].weight.requires_grad and not model[1].weight.requires_grad


def test_a_layer_itself_is_no_model():
    layer = ck.RoutedLoRALinear(4, 3, 2)
    for fn in (ck.extract, ck.to_lora):
        with pytest.raises(ValueError, match="model: got a RoutedLoRALinear itself"):
            fn(layer)
