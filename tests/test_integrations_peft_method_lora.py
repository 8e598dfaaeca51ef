"""A routed adapter of PEFT as a LoRA that PEFT itself reads: the same outputs, the routing folded in."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from peft_method import CONV, LINEAR, bits, call, config, layers, randomized, routed, two
from peft_models import quiet
from safetensors.torch import load_file
from torch import nn

from clora_kernels.integrations.peft import next_task, save_as_lora, to_lora

WAYS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "lora_dropout": 0.2},
    "by layer": {"rank_pattern": {"conv": 7}, "alpha_pattern": {"linear": 1}},
    "an expression": {"target_modules": "lin.*"},
    "one excluded": {"exclude_modules": ["linear"]},
    "a bias that learns": {"bias": "lora_only"},
    "a module that learns": {"target_modules": ["linear"], "modules_to_save": ["conv"]},
}


def trained(way: str) -> PeftModel:
    """In fp64, with another adapter beside the one that is active; whatever learns has moved."""
    model = get_peft_model(two(torch.float64), config(**WAYS[way]))
    if way != "a module that learns":
        model.add_adapter("other", config(r=2))
    randomized(model)
    next_task(model)
    randomized(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
def test_peft_reads_it(way, tmp_path) -> None:
    model = trained(way)
    x, _ = call(6)
    y, before = model(x), bits(model)
    save_as_lora(model, tmp_path / "lora")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    reader = quiet(PeftModel.from_pretrained, two(torch.float64), tmp_path / "lora")
    assert type(reader.base_model) is LoraModel
    torch.testing.assert_close(reader(x), y)
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert written.keys() == get_peft_model_state_dict(reader).keys()
    assert not [key for key in written if "routing" in key]
    converted = {name: layer for name, layer in layers(model).items() if "default" in layer.lora_A}
    assert {n for n, m in reader.named_modules() if hasattr(m, "lora_A")} == converted.keys()
    for name, layer in converted.items():
        assert torch.equal(written[f"{name}.lora_A.weight"], layer.lora_A["default"])


def test_peft_takes_config_and_tensors() -> None:
    model = routed(config(), config(r=3, lora_alpha=5), dtype=torch.float64)
    x, _ = call(6)
    lora, state = to_lora(model, "second")
    assert isinstance(lora, LoraConfig) and (lora.r, lora.lora_alpha) == (3, 5) and not lora.inference_mode
    reader = quiet(get_peft_model, two(torch.float64), lora)
    assert not set_peft_model_state_dict(reader, state).unexpected_keys
    model.set_adapter("second")
    torch.testing.assert_close(reader(x), model(x))
    layer = model.get_submodule(LINEAR)
    assert state[f"{LINEAR}.lora_A.weight"].data_ptr() != layer.lora_A["second"].data_ptr()


def test_the_fold_is_rounded_once() -> None:
    model = routed(config(), dtype=torch.bfloat16, autocast_adapter_dtype=False)
    _, state = to_lora(model)
    for name, layer in layers(model).items():
        _, B, R, R_old = layer.adapter_tensors("first")
        expected = (B.float() @ (R.float() + R_old.float()).mT).bfloat16()
        assert torch.equal(state[f"{name}.lora_B.weight"], expected)


@pytest.mark.parametrize("targets", [["conv"], ["linear"]])
def test_the_layout_is_said(targets) -> None:
    """Else PEFT would warn."""
    lora, _ = to_lora(routed(config(target_modules=targets)))
    assert lora.fan_in_fan_out == (targets == ["conv"])
    get_peft_model(two(), lora)


def test_what_is_no_one_lora_is_refused_and_nothing_is_written(tmp_path) -> None:
    model = routed(config(), config())
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match=r"adapter_name: got None while \['first', 'second'\] are active"):
        save_as_lora(model, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"adapter_name: got 'other' .* expected one of \['first', 'second'\]"):
        save_as_lora(model, tmp_path / "lora", "other")
    with pytest.raises(ValueError, match="model: got Sequential without a routed layer of PEFT"):
        save_as_lora(nn.Sequential(), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    save_as_lora(model, tmp_path / "lora", "second")
    assert f"{CONV}.lora_B.weight" in load_file(tmp_path / "lora" / "adapter_model.safetensors")
