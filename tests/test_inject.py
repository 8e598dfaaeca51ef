"""inject, extract, merge_all, freeze_base, to_lora: whole models at once."""

import re

import pytest
import torch
from layers import function_inputs, randomize, same_bits, snapshot
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

import clora_kernels as ck
from clora_kernels import RoutedLoRALinear
from clora_kernels.testing import assert_parity


def lora(linear, **kw):
    return RoutedLoRALinear.from_linear(linear, 3, frozen_routing=True, **kw)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.up = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.up(torch.tanh(self.q_proj(x)) * self.v_proj(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def randomize_all(model):
    for layer in model.modules():
        if isinstance(layer, RoutedLoRALinear):
            randomize(layer)


@pytest.mark.parametrize(
    ("targets", "swapped"),
    [
        (["q_proj", "v_proj"], ["0.q_proj", "1.q_proj", "0.v_proj", "1.v_proj"]),
        (["1.up"], ["1.up"]),
        (r"0\..*", ["0.q_proj", "0.v_proj", "0.up"]),
        (re.compile(r".*\.(q|v)_proj"), ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]),
    ],
    ids=str,
)
def test_targets_are_names_or_one_expression(model, targets, swapped):
    x, before = torch.randn(2, 8), dict(model.named_parameters())
    y = model(x)
    report = ck.inject(model, lora, targets)
    assert report.swapped == swapped and report.left == [] and report.unmatched == []
    adapted = {name for name, module in model.named_modules() if isinstance(module, RoutedLoRALinear)}
    assert adapted == set(swapped) and torch.equal(model(x), y)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert f"swapped {len(swapped)}: {swapped[0]}" in str(report)


def test_report_tells_what_was_left_and_what_matched_nothing(model):
    model[1].up.register_forward_hook(lambda *_: None)
    ck.inject(model, lora, ["0.q_proj"])
    report = ck.inject(model, lora, ["q_proj", "up", "k_proj"])
    assert report.swapped == ["1.q_proj", "0.up"] and report.unmatched == ["k_proj"]
    assert dict(report.left).keys() == {"0.q_proj", "1.up"}
    assert "adapted already" in str(report) and "hooks" in str(report) and "'k_proj' matched nothing" in str(report)


HOOKS = {
    "forward": lambda linear: linear.register_forward_hook(lambda *_: None),
    "forward pre": lambda linear: linear.register_forward_pre_hook(lambda *_: None),
    "backward": lambda linear: linear.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda linear: linear.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("make", [ck.RoutedLoRALinear, ck.RoutedLoRAFusedLinear])
@pytest.mark.parametrize("kind", HOOKS)
def test_what_inject_leaves_alone_from_linear_refuses(model, make, kind):
    """A layer with hooks, of any kind, until they are gone."""
    options = {"slices": [(0, 4)]} if make is ck.RoutedLoRAFusedLinear else {}
    linear = model[0].up
    hook = HOOKS[kind](linear)
    why = "it carries hooks, which its replacement would lose"
    with pytest.raises(TypeError, match=f"linear: got Linear, expected a plain nn.Linear or Conv1D; {why}"):
        make.from_linear(linear, 2, **options)
    with pytest.raises(ValueError, match=f"0.up was left alone: {why}"):
        ck.inject(model, lora, ["0.up"])
    hook.remove()
    assert make.from_linear(linear, 2, **options).weight is linear.weight


def test_a_patched_forward_and_a_weight_that_is_computed_are_refused(model):
    model[0].up.forward = lambda x: x
    with pytest.raises(TypeError, match="its forward is patched, which its replacement would not be"):
        lora(model[0].up)
    weight = model[1].up.weight
    del model[1].up.weight
    model[1].up.weight = weight.detach() * 2  # as the old weight_norm makes it
    with pytest.raises(TypeError, match="its weight is no Parameter of its own"):
        lora(model[1].up)
    assert dict(ck.inject(model, lora, ["1.up", "q_proj"]).left) == {"1.up": "its weight is no Parameter of its own"}


@pytest.mark.parametrize("targets", [["k_proj"], "nothing", [], ["0"]], ids=str)
def test_swapping_nothing_raises_and_changes_nothing(model, targets):
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"targets: got .*swaps nothing in Sequential"):
        ck.inject(model, lora, targets)
    assert list(model.modules()) == before


def test_a_factory_that_fails_changes_nothing(model):
    before = list(model.modules())
    with pytest.raises(ValueError, match="r: got 0"):
        ck.inject(model, lambda linear: RoutedLoRALinear.from_linear(linear, 0), ["up"])
    assert list(model.modules()) == before


def test_a_patched_forward_a_factory_without_a_module_and_targets_of_another_type(model):
    before = list(model.modules())
    with pytest.raises(TypeError, match="factory: got NoneType from it"):
        ck.inject(model, lambda linear: None, ["up"])
    with pytest.raises(TypeError, match="targets: got NoneType"):
        ck.inject(model, lora, None)
    model[0].up.forward = lambda x: x
    with pytest.raises(ValueError, match="its forward is patched"):
        ck.inject(model, lora, ["0.up"])
    assert list(model.modules()) == before


@pytest.mark.parametrize("act", [ck.to_lora, ck.extract, ck.unmerge_all, ck.merge_all])
def test_a_layer_that_cannot_be_restored_changes_nothing(act, model):
    ck.inject(model, lora, ["up"])
    randomize_all(model)
    model.eval()
    model[0].up.merge()
    model[1].up.merge(backup=None)
    layers, weights = (model[0].up, model[1].up), (model[0].up.weight, model[1].up.weight)
    before = [t.clone() for layer in layers for t in (layer.weight, *layer.adapter_state_dict().values())]
    with pytest.raises(RuntimeError, match="backup=None"):
        act(model)
    after = [t for layer in layers for t in (layer.weight, *layer.adapter_state_dict().values())]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(layer.merged and layer.weight is weight for layer, weight in zip(layers, weights, strict=True))


def test_a_layer_that_cannot_be_merged_leaves_all_unmerged(model):
    ck.inject(model, lora, ["0.up"])
    ck.inject(model, lambda linear: RoutedLoRALinear.from_linear(linear, 3, routing=2), ["1.up"])
    with pytest.raises(ValueError, match="bank of 2"):
        ck.merge_all(model)
    assert not model[0].up.merged and not model[1].up.merged


def test_a_shared_layer_stays_shared(model):
    model[1].q_proj = model[0].q_proj
    report = ck.inject(model, lora, ["q_proj"])
    assert report.swapped == ["0.q_proj", "1.q_proj"] and model[0].q_proj is model[1].q_proj


def test_layers_whose_weight_is_read_without_a_call_are_left_alone():
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match="inference path"):
        ck.inject(encoder, lora, ["linear1"])
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear"):
        ck.inject(encoder, lora, ["out_proj"])


def test_extract_is_the_inverse(model):
    x, before = torch.randn(2, 8), snapshot(model)
    ck.inject(model, lora, ["q_proj", "up"])
    randomize_all(model)
    y = model(x)
    model.eval()
    ck.merge_all(model)
    adapters = ck.extract(model)
    assert adapters.keys() == {"0.q_proj", "0.up", "1.q_proj", "1.up"}
    assert same_bits(snapshot(model), before) and type(model[0].up) is nn.Linear
    ck.inject(model, lora, ["q_proj", "up"])
    for name, state in adapters.items():
        model.get_submodule(name).load_adapter_state_dict(state)
    assert torch.equal(model(x), y)


def test_merge_all_and_unmerge_all(model):
    ck.inject(model, lora, ["q_proj"])
    randomize_all(model)
    before, weight = snapshot(model.eval()), model[0].q_proj.weight
    assert ck.merge_all(model, backup="cpu") == ["0.q_proj", "1.q_proj"]
    assert model[0].q_proj.merged and same_bits(snapshot(model), before)
    assert model[0].q_proj.weight is weight, "with a backup on the device it is another parameter"
    assert ck.unmerge_all(model) == ["0.q_proj", "1.q_proj"] and not model[0].q_proj.merged


@pytest.mark.parametrize("backup", ["cpu", None])
def test_a_tied_weight_is_merged_only_where_the_others_keep_theirs(model, backup):
    ck.inject(model, lora, ["q_proj", "up"])
    randomize_all(model.eval())
    model[1].q_proj.weight = model[0].q_proj.weight
    x, before = torch.randn(2, 8), snapshot(model)
    y = model(x)
    with pytest.raises(ValueError, match=r"got .* that 0.q_proj.weight and 1.q_proj.weight share, expected 'device'"):
        ck.merge_all(model, backup=backup)
    assert same_bits(snapshot(model), before) and not model[0].up.merged
    ck.merge_all(model)
    torch.testing.assert_close(model(x), y)
    ck.unmerge_all(model)
    assert same_bits(snapshot(model), before) and torch.equal(model(x), y)


def test_a_weight_tied_to_an_embedding_is_not_merged_over_it():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    ck.inject(model, lora, ["head"])
    with pytest.raises(ValueError, match=r"got 'cpu' .* that embed\.weight and head\.weight share, expected 'device'"):
        ck.merge_all(model, backup="cpu")
    assert not model["head"].merged


def test_freeze_base_leaves_the_adapters(model):
    ck.inject(model, lora, ["up"])
    model[0].up.lora_A.requires_grad_(False)
    trainable = ck.freeze_base(model)
    assert trainable == ["0.up.lora_B", "0.up.routing", "1.up.lora_A", "1.up.lora_B", "1.up.routing"]
    model(torch.randn(2, 8)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trainable)


@pytest.mark.parametrize("act", [ck.extract, ck.merge_all, ck.unmerge_all, ck.freeze_base, ck.to_lora])
def test_a_model_without_adapters_is_an_error(act, model):
    with pytest.raises(ValueError, match="without an adapted layer"):
        act(model)


def test_to_lora_folds_both_routings_and_names_tensors_as_peft_does(model):
    x = torch.randn(2, 8)
    ck.inject(model, lora, ["q_proj"])
    randomize_all(model)
    layer = model[0].q_proj
    inputs = function_inputs(layer, x)
    total = (layer.routing + layer.frozen_routing).detach()
    expected = layer.lora_B.detach() @ total.mT
    state = ck.to_lora(model)
    assert list(state)[:2] == [f"base_model.model.0.q_proj.lora_{k}.weight" for k in "AB"]
    assert torch.equal(state["base_model.model.0.q_proj.lora_B.weight"], expected)
    assert not any(t.requires_grad for t in state.values())
    assert layer.routing is None and layer.frozen_routing is None
    assert_parity({"y": layer(inputs["x"]).detach()}, inputs)


def test_to_lora_rounds_a_16_bit_adapter_once():
    """Whole numbers, of which neither the sum of the routings nor, on the way, a product is one of bf16."""
    model = nn.Sequential(nn.Linear(8, 8))
    ck.inject(model, lambda linear: lora(linear, adapter_dtype=torch.bfloat16), ["0"])
    layer = model[0]
    with torch.no_grad():
        layer.routing.copy_(torch.randint(1, 200, (3, 3)))
        layer.frozen_routing.copy_(torch.randint(1, 128, (3, 3)) * 256)
        layer.lora_B.copy_(torch.randint(-9, 9, (8, 3)))
    total = layer.routing.double() + layer.frozen_routing.double()
    expected = (layer.lora_B.double() @ total.mT).bfloat16()
    assert not torch.equal(total.bfloat16().double(), total)
    assert torch.equal(ck.to_lora(model)["base_model.model.0.lora_B.weight"], expected)


def test_to_lora_refuses_a_bank_and_leaves_the_model_as_it_was(model):
    ck.inject(model, lora, ["0.up"])
    ck.inject(model, lambda linear: RoutedLoRALinear.from_linear(linear, 3, routing=2), ["1.up"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="bank of 2"):
        ck.to_lora(model)
    assert same_bits(snapshot(model), before)


def test_transformers_models_run_adapted():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit = ViTModel(ViTConfig(**small, image_size=8, patch_size=2))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16))
    for net, targets, call in (
        (vit, r".*(query|value|q_proj|v_proj)", lambda: vit(torch.ones(2, 3, 8, 8)).last_hidden_state),
        (gpt2, ["c_attn", "c_fc"], lambda: gpt2(torch.arange(8)[None]).logits),
    ):
        net.eval()
        y = call()
        report = ck.inject(net, lora, targets)
        assert len(report.swapped) == 4 and torch.equal(call(), y)
        ck.freeze_base(net)
        randomize_all(net)
        adapted = call()
        assert not torch.equal(adapted, y)
        adapted.square().sum().backward()
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
