"""Files of routed LoRA as a method of PEFT: saved, loaded by PEFT and transformers, refused where they do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft_method import CONV, KINDS, LINEAR, bits, call, config, layers, learning, of, randomized, routed, two
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from clora_kernels.integrations.peft import RoutedLoraConfig, next_task, save_as_lora
from clora_kernels.integrations.peft.routed_lora import RoutedLoraModel, RoutedLoraType

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(20).reshape(2, 10)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()


def routed_llama(**options) -> PeftModel:
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*1\.mlp.*"}
    return randomized(get_peft_model(llama(), RoutedLoraConfig(**settings, **options))).eval()


@pytest.fixture
def saved(tmp_path):
    """(model with two adapters, folder of the first one)."""
    model = routed(config(train_factors="first_task"), config(r=3))
    next_task(model)
    randomized(model)
    model.save_pretrained(tmp_path / "files")
    return model, tmp_path / "files" / "first"


@pytest.mark.parametrize("low", [False, True])
def test_saved_and_loaded(saved, low) -> None:
    model, folder = saved
    x, _ = call(5, dtype=torch.float32)
    tensors = load_file(folder / WEIGHTS)
    assert tensors.keys() == {f"{layer}.{kind}" for layer in (LINEAR, CONV) for kind in KINDS}
    written = json.loads((folder / CONFIG).read_text())
    assert (written["peft_type"], written["task"], written["r"]) == ("ROUTED_LORA", 2, 4)
    again = PeftConfig.from_pretrained(folder)
    assert isinstance(again, RoutedLoraConfig) and again.peft_type is RoutedLoraType.ROUTED_LORA
    loaded = PeftModel.from_pretrained(two(), folder, low_cpu_mem_usage=low)
    assert isinstance(loaded.base_model, RoutedLoraModel) and not learning(loaded)
    torch.testing.assert_close(loaded(x), model(x))
    trained = PeftModel.from_pretrained(two(), folder, is_trainable=True, low_cpu_mem_usage=low)
    assert learning(trained) == of("default", "lora_routing"), "factors of the first task stay as it left them"
    loaded.load_adapter(folder.parent / "second", "other", low_cpu_mem_usage=low)
    torch.testing.assert_close(loaded(x), model(x))
    assert not learning(loaded)
    loaded.set_adapter("other")
    model.set_adapter("second")
    # What is not copied lies where the file has it, and a product adds up in another order where memory is not aligned.
    torch.testing.assert_close(loaded(x), model(x))
    assert learning(loaded) == of("other")
    for name, layer in layers(loaded).items():
        theirs = model.get_submodule(name).adapter_tensors("second")
        assert all(map(torch.equal, layer.adapter_tensors("other"), theirs))


@pytest.mark.parametrize("low", [False, True])
def test_nothing_is_rounded_on_the_way(saved, low) -> None:
    model, folder = saved
    loaded = PeftModel.from_pretrained(two(torch.bfloat16), folder, low_cpu_mem_usage=low)
    if low:  # where PEFT would keep them on the meta device until they are loaded
        loaded.load_adapter(folder, "again", low_cpu_mem_usage=True)
    for name, layer in layers(loaded).items():
        for adapter in layer.lora_A:
            pairs = zip(layer.adapter_tensors(adapter), model.get_submodule(name).adapter_tensors("first"), strict=True)
            for ours, theirs in pairs:
                # Without low_cpu_mem_usage PEFT copies into tensors that are in fp32 by then.
                assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_state_dict_without_files() -> None:
    model, other = routed(config()), routed(config())
    randomized(other, 3)
    other.base_model.set_adapter([])
    state = get_peft_model_state_dict(model, adapter_name="first")
    set_peft_model_state_dict(other, state, "first")
    other.set_adapter("first")
    x, _ = call(5, dtype=torch.float32)
    assert torch.equal(other(x), model(x))


def broken(folder, how: str) -> None:
    """Spoil the files in ``folder``."""
    path = folder / WEIGHTS
    tensors = load_file(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "corrupted":
        path.write_bytes(b"\xff" * 200)
    elif how == "missing":
        save_file({k: t for k, t in tensors.items() if k != f"{CONV}.lora_frozen_routing"}, path)
    elif how == "unexpected":
        save_file({**tensors, "base_model.model.elsewhere.lora_routing": torch.zeros(4, 4)}, path)
    else:
        written = json.loads((folder / CONFIG).read_text())
        changes = {"rank": {"r": 5}, "future": {"gates": 3}}[how]
        (folder / CONFIG).write_text(json.dumps(written | changes))


BROKEN = {
    "truncated": (Exception, "incomplete|Invalid|invalid"),
    "corrupted": (Exception, "Header|header"),
    "missing": (ValueError, rf"state_dict: misses \['{CONV}.lora_frozen_routing.new'\], expected every tensor"),
    "unexpected": (ValueError, r"state_dict: holds \['base_model.model.elsewhere.lora_routing'\], of which adapter"),
    "rank": (ValueError, r"lora_A.new'\]: got shape \(4, \d+\), expected \(5, \d+\)"),
    "future": (TypeError, "gates: no field of RoutedLoraConfig, expected some of alpha_pattern, .* later version"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_files_that_do_not_fit_leave_the_model_as_it_was(saved, how) -> None:
    """As far as PEFT lets them: a new adapter is there, inactive and new, where its tensors were what did not fit."""
    model, folder = saved
    broken(folder, how)
    x, _ = call(5, dtype=torch.float32)
    y, before, learns = model(x), bits(model), learning(model)
    error, message = BROKEN[how]
    with pytest.raises(error, match=message):
        model.load_adapter(folder, "new")
    assert torch.equal(model(x), y) and learning(model) == learns and model.active_adapter == "first"
    assert ("new" in model.peft_config) == (how != "future")
    if how != "future":
        model.delete_adapter("new")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], t) for k, t in before.items())


@pytest.mark.parametrize("how", ["missing", "unexpected", "shape"])
def test_a_state_that_does_not_fit_writes_nothing(how) -> None:
    model = routed(config())
    before = bits(model)
    state = {k: torch.ones_like(t) for k, t in get_peft_model_state_dict(model, adapter_name="first").items()}
    name = f"{CONV}.lora_routing"
    if how == "missing":
        del state[name]
    elif how == "shape":
        state[name] = torch.ones(5, 5)
    else:
        state[f"{LINEAR}.conv.lora_A"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match="state_dict"):
        set_peft_model_state_dict(model, state, "first")
    assert all(torch.equal(model.state_dict()[k], t) for k, t in before.items())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
@pytest.mark.parametrize("base", ["peft", "transformers"])
def test_transformers_loads_what_peft_saved(base, tmp_path) -> None:
    model = routed_llama(task=3)
    y = model(IDS).logits
    model.save_pretrained(tmp_path)
    if base == "transformers":  # and what it saves itself
        plain = llama()
        plain.load_adapter(tmp_path)
        shutil.rmtree(tmp_path)
        plain.save_pretrained(tmp_path)
        torch.testing.assert_close(PeftModel.from_pretrained(llama(), tmp_path)(IDS).logits, y)
    plain = llama()
    info = plain.load_adapter(tmp_path)
    torch.testing.assert_close(plain(IDS).logits, y)
    assert not learning(plain)
    assert not (info.missing_keys or info.unexpected_keys or info.mismatched_keys)
    assert len(layers(plain)) == 3 and plain.peft_config["default"].task == 3
    plain.load_adapter(tmp_path, "again", is_trainable=True)
    plain.set_adapter("again")
    changed = plain(IDS).logits
    torch.testing.assert_close(changed, y)
    assert {name.rpartition(".")[2] for name in learning(plain)} == {"again"}
    next_task(plain)
    assert torch.equal(plain(IDS).logits, changed) and plain.peft_config["again"].task == 4


def test_transformers_adds_an_adapter(tmp_path) -> None:
    plain = llama()
    y = plain(IDS).logits
    plain.add_adapter(RoutedLoraConfig(r=4, target_modules=["q_proj"], routing_init="c-lora"))
    assert len(layers(plain)) == 2 and len(learning(plain)) == 6
    torch.testing.assert_close(plain(IDS).logits, y)
    randomized(plain)
    changed = plain(IDS).logits
    plain.disable_adapters()
    assert torch.equal(plain(IDS).logits, y)
    plain.enable_adapters()
    assert torch.equal(plain(IDS).logits, changed) and not torch.equal(changed, y)
    save_as_lora(plain, tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), tmp_path)(IDS).logits, changed)


@pytest.mark.parametrize("how", ["truncated", "rank", "future"])
def test_transformers_refuses_files_that_do_not_fit(how, tmp_path) -> None:
    routed_llama().save_pretrained(tmp_path)
    broken(tmp_path, how)
    plain = llama()
    y = plain(IDS).logits
    with pytest.raises(
        Exception, match={"rank": "size|mismatch|shape", "future": "gates"}.get(how, "(?i)incomplete|invalid")
    ):
        plain.load_adapter(tmp_path)
    assert bool(layers(plain)) == (how != "future")
    plain.eval()
    torch.testing.assert_close(plain(IDS).logits, y)
