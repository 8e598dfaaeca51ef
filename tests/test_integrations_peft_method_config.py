"""Routed LoRA as a method of PEFT: its settings, its place in PEFT's tables, what it cannot be put on."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import peft
import pytest
import torch
from peft import PeftConfig, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft_method import CONV, KINDS, LINEAR, bits, call, config, layers, learning, routed, two
from peft_models import WIDTHS
from test_import import run
from torch import nn

import clora_kernels.integrations.peft as integration
from clora_kernels.integrations.peft import RoutedLoraConfig
from clora_kernels.integrations.peft.routed_lora import RoutedLinear, RoutedLoraModel, RoutedLoraType
from clora_kernels.integrations.peft.routed_lora.config import check_version
from clora_kernels.integrations.peft.routed_lora.model import register

BAD = {
    "r: got 0, expected a rank of at least 1, an int": {"r": 0},
    "r: got 2.0, expected a rank": {"r": 2.0},
    "r: got True, expected a rank": {"r": True},
    r"rank_pattern\['conv'\]: got -1, expected a rank": {"rank_pattern": {"conv": -1}},
    "lora_alpha: got inf, expected a finite number": {"lora_alpha": float("inf")},
    "lora_alpha: got '8', expected a finite number": {"lora_alpha": "8"},
    r"alpha_pattern\['conv'\]: got None, expected a finite number": {"alpha_pattern": {"conv": None}},
    r"lora_dropout: got 1.5, expected a probability in \[0, 1\]": {"lora_dropout": 1.5},
    "lora_dropout: got nan": {"lora_dropout": float("nan")},
    "lora_dropout: got '0.1'": {"lora_dropout": "0.1"},
    "routing_init: got 'zero', expected one of identity, c-lora": {"routing_init": "zero"},
    "train_factors: got 'never', expected one of always, first_task": {"train_factors": "never"},
    "task: got 0, expected an int of at least 1": {"task": 0},
    "bias: got 'some', expected one of none, all, lora_only": {"bias": "some"},
    "layers_pattern: got 'h' without layers_to_transform": {"layers_pattern": "h"},
}


@pytest.mark.parametrize("message", BAD)
def test_settings_out_of_range(message) -> None:
    with pytest.raises(ValueError, match=message):
        config(**BAD[message])


def test_settings_that_are_not_known() -> None:
    with pytest.raises(TypeError, match="rank, use_dora: no field of RoutedLoraConfig, expected some of alpha_pattern"):
        RoutedLoraConfig(rank=3, use_dora=True)


def test_settings_are_kept() -> None:
    settings = config(r=3, use_rslora=True, task=4, rank_pattern={"conv": 5}, layers_to_transform=[1])
    assert settings.target_modules == {"linear", "conv"} and settings.peft_type == "ROUTED_LORA"
    assert (settings.rank_of("a.conv"), settings.rank_of("a.other")) == (5, 3)
    assert (settings.scaling_of("a.conv"), settings.scaling_of("conv2")) == (6 / 5**0.5, 6 / 3**0.5)
    for again in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings)), dataclasses.replace(settings)):
        assert again == settings and isinstance(again.peft_type, RoutedLoraType)
    assert get_peft_config({"peft_type": "ROUTED_LORA", "r": 2}) == RoutedLoraConfig(r=2)


def test_a_config_file_of_peft_s_own_class(tmp_path) -> None:
    config(task=2).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == RoutedLoraConfig.from_pretrained(tmp_path) == config(task=2)


def test_the_method_stands_in_peft_s_tables(monkeypatch) -> None:
    register()  # again, which changes nothing
    for kind in ("ROUTED_LORA", RoutedLoraType.ROUTED_LORA):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[kind] is RoutedLoraConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[kind] is RoutedLoraModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == "lora_"
    assert all(kind.startswith(RoutedLoraModel.prefix) for kind in KINDS)
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, RoutedLoraType.ROUTED_LORA, nn.Module)
    with pytest.raises(RuntimeError, match=r"peft: got a method ROUTED_LORA that is <class 'torch.nn.*Module'>"):
        register()


@pytest.mark.parametrize("version", ["0.20.5", "0.22.0", "0.22.0.dev0", "1.21.0"])
def test_other_versions_of_peft_are_refused(version) -> None:
    check_version(peft.__version__)
    check_version("0.21.0")
    with pytest.raises(ImportError, match=rf"peft: got version {version}, expected peft>=0.21,<0.22"):
        check_version(version)


def test_peft_is_asked_for_late() -> None:
    assert integration.RoutedLoraConfig is RoutedLoraConfig
    with pytest.raises(AttributeError, match="has no attribute 'RoutedLora'"):
        integration.RoutedLora  # noqa: B018
    run("""
        import sys
        import clora_kernels.integrations.peft as integration
        assert "peft" not in sys.modules
        sys.modules["peft"] = None
        try:
            integration.RoutedLoraConfig
        except ImportError as error:
            assert "peft" in str(error)
        else:
            raise AssertionError
    """)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embed, self.conv1d, self.norm = (
            nn.Linear(4, 5), nn.Embedding(9, 4), nn.Conv1d(3, 3, 1), nn.LayerNorm(5)
        )  # fmt: skip


@pytest.mark.parametrize("name", ["embed", "conv1d", "norm"])
def test_what_is_no_linear_layer_is_refused_and_nothing_is_changed(name) -> None:
    model = Odd()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=f"target_modules: got a .*, expected nn.Linear, .*; it is '{name}'"):
        get_peft_model(model, RoutedLoraConfig(r=2, target_modules=["linear", name]))
    assert [type(module) for module in model.modules()] == kinds and all(p.requires_grad for p in model.parameters())
    model = get_peft_model(model, RoutedLoraConfig(r=2, target_modules=["linear"]))
    learns, before = learning(model), bits(model)
    with pytest.raises(TypeError, match=f"it is '{name}'"):
        model.add_adapter("other", RoutedLoraConfig(r=2, target_modules=["linear", name]))
    assert learning(model) == learns and model.state_dict().keys() == before.keys()


def test_all_linear_layers() -> None:
    model = get_peft_model(Odd(), RoutedLoraConfig(r=2, target_modules="all-linear"))
    assert list(layers(model)) == [LINEAR]
    model = routed(config(target_modules="all-linear"), config(target_modules="all-linear"))
    assert set(layers(model)) == {LINEAR, CONV}
    assert all(set(layer.lora_A) == {"first", "second"} for layer in layers(model).values())


class Packed(nn.Module):
    """A linear layer of another make, whose weight is no floating-point matrix, as quantised ones are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().amax() / 127
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scale).mT.to(x.dtype)


@pytest.mark.filterwarnings("ignore:Unsupported layer type .*Packed:UserWarning")
def test_layers_of_another_make() -> None:
    model = two()
    packed = model.conv = Packed(nn.Linear(*WIDTHS))
    x, _ = call(5, dtype=torch.float32)
    routed_model = get_peft_model(model, config(routing_init="c-lora"))
    layer = routed_model.get_submodule(CONV)
    assert isinstance(layer, RoutedLinear) and torch.equal(layer(x), packed(x))
    with torch.no_grad():
        layer.lora_routing["default"].normal_()
    A, B, R, _ = layer.adapter_tensors("default")
    torch.testing.assert_close(layer(x), packed(x) + 1.5 * x @ A.mT @ R @ B.mT)
    assert A.dtype == torch.float32 and A.shape == (4, WIDTHS[0])
    for merge in (routed_model.merge_adapter, routed_model.merge_and_unload):
        with pytest.raises(ValueError, match=r"no adapter can be merged exactly: Packed is neither nn.Linear nor Conv"):
            merge()
        assert not any(other.merged for other in layers(routed_model).values()), "nor any layer before it"
    routed_model.unmerge_adapter()  # there is nothing to do
