"""An adapter of this package, read by PEFT as its own: no routing, the same outputs."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from layers import function_inputs, randomize, snapshot
from torch import nn
from transformers.pytorch_utils import Conv1D

import clora_kernels as ck
from clora_kernels import RoutedLoRAFusedLinear, RoutedLoRALinear
from clora_kernels.integrations.peft import lora_config, save_pretrained
from clora_kernels.testing import assert_parity


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="PEFT is not installed: nothing reads what is written")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(9, 12), nn.Linear(12, 5)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)}) for _ in "ab")

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.out(x)


def trained(model, factory, targets, x):
    """``model`` with adapters of random earlier and new routings, after a step of training."""
    ck.inject(model, factory, targets)
    ck.freeze_base(model)
    for i, layer in enumerate(adapted(model).values()):
        randomize(layer, i)
    before = snapshot(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(x).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    moved = ("lora_A", "lora_B", "routing", "scaling")  # and no frozen_routing
    assert all(torch.equal(before[k], after[k]) == (k.rpartition(".")[2] not in moved) for k in before)
    return model.eval()


def adapted(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, RoutedLoRALinear)}


def caught(model, names, x):
    """What each of the named layers gets and gives in a call of ``model``."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, y, name=name: seen.update({name: (args[0].detach(), y.detach())})
        )
        for name in names
    ]
    y = model(x)
    for handle in handles:
        handle.remove()
    return y, seen


def assert_reads(net, reader, x):
    """Each adapted layer of PEFT's model computes, on what it gets, what the layer with its routings computed."""
    y, seen = caught(reader, (f"base_model.model.{name}" for name in net), x)
    for name, layer in net.items():
        got, gave = seen[f"base_model.model.{name}"]
        assert_parity({"y": gave}, function_inputs(layer, got))
    return y


def common(linear):
    return RoutedLoRALinear.from_linear(linear, 3, frozen_routing=True, scaling=0.7, dropout_p=0.1)


def varied(linear):
    """Another rank and a scaling that learns for each width."""
    scaling = nn.Parameter(torch.tensor(0.5 + linear.out_features / 10))
    return RoutedLoRALinear.from_linear(linear, linear.out_features // 4, frozen_routing=True, scaling=scaling)


def fused(linear):
    return RoutedLoRAFusedLinear.from_linear(linear, 2, slices=[(0, 4), (6, 11)], frozen_routing=True, scaling=1.5)


WAYS = {
    "common": (common, ["up", "down"], ["down", "up"]),
    "varied": (varied, ["up", "out", "blocks.0.down"], None),
    "fused": (fused, ["down"], ["down"]),
    "one of two": (common, ["blocks.1.up"], r"blocks\.1\.up"),
}


@pytest.mark.parametrize("way", WAYS)
def test_peft_reads_the_files(peft, tmp_path, way):
    torch.manual_seed(0)
    factory, targets, written = WAYS[way]
    plain, x = Net(), torch.randn(7, 9)
    model = trained(copy.deepcopy(plain), factory, targets, x)
    with_routings = copy.deepcopy(model)
    ck.merge_all(model)
    before, parameters = snapshot(model), list(model.parameters())
    save_pretrained(model, tmp_path / "adapter", "a/model")
    after = snapshot(model)
    assert all(torch.equal(before[k], after[k]) for k in before) and before.keys() == after.keys()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(layer.merged and layer.routing is not None for layer in adapted(model).values())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written is None or config["target_modules"] == written
    assert config["base_model_name_or_path"] == "a/model"
    before = plain(x)
    reader = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter")
    y = assert_reads(adapted(with_routings), reader, x)
    assert not torch.equal(y, before)
    assert not [name for name, p in reader.named_parameters() if p.requires_grad]
    again = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=1, target_modules=["embed"]))
    loaded = again.load_adapter(tmp_path / "adapter", "ours")
    again.set_adapter("ours")
    assert not loaded.unexpected_keys and torch.equal(again.eval()(x), y)


def test_peft_takes_the_tensors_of_to_lora(peft):
    """Strictly: every tensor of PEFT's adapter is there, and no other."""
    torch.manual_seed(0)
    plain, x = Net(), torch.randn(7, 9)
    model = trained(copy.deepcopy(plain), common, ["up", "down"], x)
    with_routings = copy.deepcopy(model)
    state = ck.to_lora(model)
    config = peft.LoraConfig(r=3, lora_alpha=0.7 * 3, target_modules=["up", "down"])
    reader = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    assert peft.get_peft_model_state_dict(reader).keys() == state.keys()
    loaded = peft.set_peft_model_state_dict(reader, state)
    assert not loaded.unexpected_keys and not [k for k in loaded.missing_keys if "lora" in k]
    assert_reads(adapted(with_routings), reader, x)


class LookAlikes(nn.Module):
    """Paths of which one ends like another, and one looks like another's pattern."""

    def __init__(self):
        super().__init__()
        self.up, self.z, self.z_up, self.last = nn.Linear(6, 6), nn.Module(), nn.Linear(6, 6), nn.Linear(6, 6)
        self.z.up = nn.Linear(6, 6)

    def forward(self, x):
        return self.last(torch.tanh(self.z_up(torch.tanh(self.z.up(torch.tanh(self.up(x)))))))


def test_each_layer_gets_its_own_rank(peft, tmp_path):
    torch.manual_seed(0)
    plain, x = LookAlikes(), torch.randn(5, 6)
    model = copy.deepcopy(plain)
    ranks = {model.up: 1, model.z.up: 3, model.z_up: 2, model.last: 2}
    trained(model, lambda linear: RoutedLoRALinear.from_linear(linear, ranks[linear]), r".*(up|last)", x)
    with_routings = copy.deepcopy(model)
    save_pretrained(model, tmp_path)
    config = lora_config(model)
    assert (config["r"], config["lora_alpha"]) == (2, 2.0) and sorted(config["rank_pattern"].values()) == [1, 3]
    assert_reads(adapted(with_routings), peft.PeftModel.from_pretrained(plain, tmp_path), x)


def test_weights_laid_out_the_other_way(peft, tmp_path):
    torch.manual_seed(0)
    plain, x = nn.Sequential(Conv1D(12, 9), nn.Tanh(), Conv1D(7, 12)), torch.randn(6, 9)
    model = trained(copy.deepcopy(plain), common, ["0", "2"], x)
    with_routings = copy.deepcopy(model)
    save_pretrained(model, tmp_path)
    assert_reads(adapted(with_routings), peft.PeftModel.from_pretrained(plain, tmp_path), x)


def test_what_cannot_be_said_in_lora_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    model = Net()
    with pytest.raises(ValueError, match="without a routed LoRA layer"):
        lora_config(model)
    ck.inject(model, lambda linear: RoutedLoRALinear.from_linear(linear, 3, routing=2), ["out"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="bank of 2"):
        save_pretrained(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="bank of 2"):
        lora_config(model)
    ck.extract(model)
    ck.inject(model, common, ["out"])
    before = snapshot(model)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError):
        save_pretrained(model, tmp_path / "adapter")
    assert before.keys() == model.state_dict().keys() and not (tmp_path / "adapter").exists()
