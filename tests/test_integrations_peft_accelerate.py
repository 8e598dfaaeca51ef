"""PEFT models accelerated in place: the same numbers, the same model, and the truth about what is not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft_models import WIDTHS, Two, assert_as_good, config, peft_model, quiet, results
from torch import nn

from clora_kernels.integrations.peft import accelerate, restore

K, N = WIDTHS
FUSED = "in one sum with its base layer"
LAYERS = ["base_model.model.linear", "base_model.model.conv"]


def call(*lead: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*lead, size, generator=generator).to(dtype) for size in (K, N))


def accelerated_copy(model):
    other = copy.deepcopy(model)
    return other, accelerate(other)


WAYS = {
    "one": [config()],
    "rank-stabilised": [config(use_rslora=True)],
    "a bias that learns": [config(bias="lora_only")],
    "ranks by layer": [config(rank_pattern={"conv": 7}, alpha_pattern={"linear": 1})],
    "dropout": [config(lora_dropout=0.3)],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lead", [(5,), (3, 4), (2, 3, 2), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_the_same_numbers(way, lead, dtype) -> None:
    model = peft_model(*WAYS[way], dtype=dtype).eval()
    other, report = accelerated_copy(model)
    assert report.accelerated == {name: FUSED for name in LAYERS} and not report.left_alone
    x, dy = call(*lead, dtype=dtype)
    assert_as_good(model, other, x, dy)
    assert not report.fell_back


def small(model, share: float):
    """The same with lora_B scaled down: adapters are small beside what they adapt."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(share)
    return model


@pytest.mark.parametrize("fp32_adapter", [True, False], ids=["fp32 adapter", "16-bit adapter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_closer_to_the_truth_in_16_bit(dtype, fp32_adapter) -> None:
    model = small(peft_model(config(), dtype=dtype, autocast_adapter_dtype=fp32_adapter), 0.02)
    layer = model.get_submodule(LAYERS[0])
    layer.base_layer.bias = None  # it is a rounding of its own on ATen matmuls
    other = copy.deepcopy(layer)
    accelerate(other)
    x, dy = call(512, dtype=dtype)
    truth = results(copy.deepcopy(layer).double(), x.double(), dy.double())
    theirs, ours = (
        {k: float((v.double() - truth[k]).norm() / truth[k].norm()) for k, v in results(m, x, dy).items()}
        for m in (layer, other)
    )
    assert ours["y"] < 0.9 * theirs["y"]
    if not fp32_adapter:
        assert_as_good(layer, other, x, dy)
        return
    # Of an adapter in fp32 PEFT computes the gradients in fp32; here its factors are rounded to x.dtype once.
    assert all(error <= torch.finfo(dtype).eps for name, error in ours.items() if "lora" in name)
    assert ours["dx"] < theirs["dx"]


@pytest.mark.parametrize("trained", ["adapters", "all"])
def test_several_active_adapters(trained) -> None:
    model = peft_model(config(), config(r=3, lora_alpha=1), config(r=5, use_rslora=True))
    model.base_model.set_adapter(["first", "third"])
    if trained == "all":
        model.requires_grad_(True)
    other, report = accelerated_copy(model)
    assert_as_good(model, other, *call(6, 5))
    active = {name.split(".")[-2] for name in results(other, *call(6)) if ".lora_A." in name}
    assert active == {"first", "third"} and not report.fell_back


def test_autocast() -> None:
    model = peft_model(config())
    other, _ = accelerated_copy(model)
    x, dy = call(64)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (results(m, x, dy.bfloat16()) for m in (model, other))
    truth = results(copy.deepcopy(model).double(), x.double(), dy.double())
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        errors = [(got.double() - truth[name]).norm() for got in (value, ours[name])]
        assert errors[1] <= 2 * errors[0], name


def dropped(model, name: str) -> torch.Tensor:
    """[16384]: by how much the adapter counts each element of x, in a model whose adapter is the identity on one."""
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.get_base_layer().weight.zero_()
        layer.get_base_layer().bias.zero_()
        layer.lora_A["first"].weight.zero_()[0, 0] = 1.0
        layer.lora_B["first"].weight.zero_()[:, 0] = 1.0
    return layer(torch.ones(16384, K))[:, 0] / layer.scaling["first"]


def test_dropout_has_the_distribution_of_peft() -> None:
    model = peft_model(config(lora_dropout=0.25)).train()
    _, report = accelerated_copy(model)
    accelerate(model)
    counted, again, of_conv = (dropped(model, name) for name in (LAYERS[0], LAYERS[0], LAYERS[1]))
    kept = counted != 0
    torch.testing.assert_close(counted[kept], torch.full_like(counted[kept], 4 / 3))
    # Five standard deviations of a count of 16384 draws.
    assert abs(kept.double().mean() - 0.75) < 5 * (0.25 * 0.75 / 16384) ** 0.5
    assert not torch.equal(counted, again) and not torch.equal(counted, of_conv)
    assert (dropped(model.eval(), LAYERS[0]) == 1).all() and not report.fell_back


def test_dropout_of_several_adapters_is_drawn_for_each() -> None:
    model = peft_model(config(lora_dropout=0.5), config(r=3)).train()
    model.base_model.set_adapter(["first", "second"])
    other, report = accelerated_copy(model)
    layer, x = other.get_submodule(LAYERS[0]), call(4000)[0]
    # Where "first" drops whole rows of a one-column x nothing of it is left: what remains is "second" and the base.
    with torch.no_grad():
        layer.lora_A["first"].weight[:, 1:] = 0
    y = layer(x)
    base = (
        layer.base_layer(x)
        + layer.scaling["second"] * x @ layer.lora_A["second"].weight.mT @ layer.lora_B["second"].weight.mT
    )
    left = (y - base).abs().amax(1) < 1e-5
    assert abs(left.double().mean() - 0.5) < 5 * (0.25 / 4000) ** 0.5 and not report.fell_back


def test_states_of_a_model() -> None:
    """Each step on both models, which compute the same after it."""
    model = peft_model(config(), config(r=3))
    other, report = accelerated_copy(model)
    x, dy = call(7)

    def same() -> None:
        torch.testing.assert_close(other(x), model(x))

    for m in (model, other):
        m.set_adapter("second")
    assert_as_good(model, other, x, dy)
    with model.disable_adapter(), other.disable_adapter():
        assert torch.equal(other(x), model(x))
        assert set(report.accelerated.values()) == {"the base layer alone while its adapters are disabled"}
    same()
    for m in (model, other):
        m.merge_adapter(["first"])
    same()
    assert set(report.accelerated.values()) == {"the base layer alone while its adapters are merged"}
    for m in (model, other):
        m.unmerge_adapter()
    same()
    for m in (model, other):
        m.add_weighted_adapter(["first", "second"], [0.7, 0.2], "both", combination_type="cat")
        m.set_adapter("both")
    same()
    for m in (model, other):
        m.set_adapter("first")
        m.delete_adapter("both")
    assert_as_good(model, other, x, dy)
    assert not report.fell_back and not report.left_alone
    plain, from_other = model.merge_and_unload(), other.merge_and_unload()
    assert isinstance(from_other, Two) and torch.equal(plain(x), from_other(x))


def test_files_are_those_of_peft(tmp_path) -> None:
    from peft import PeftModel

    model = peft_model(config())
    other, _ = accelerated_copy(model)
    for name, m in (("theirs", model), ("ours", other)):
        m.save_pretrained(tmp_path / name)
    written = [(tmp_path / name / "first" / "adapter_model.safetensors").read_bytes() for name in ("theirs", "ours")]
    assert written[0] == written[1] and list(model.state_dict()) == list(other.state_dict())
    torch.manual_seed(0)
    loaded = quiet(PeftModel.from_pretrained, Two(), tmp_path / "ours" / "first")
    report = accelerate(loaded)
    with torch.no_grad():
        for name, p in loaded.named_parameters():
            if "base_layer" in name:
                p.copy_(model.get_parameter(name))
    x = call(5)[0]
    torch.testing.assert_close(loaded(x), model(x))
    quiet(loaded.load_adapter, tmp_path / "theirs" / "first", "again")
    loaded.set_adapter("again")
    torch.testing.assert_close(loaded(x), model(x))
    assert not report.left_alone and not report.fell_back


def test_what_is_accelerated_can_be_restored_copied_and_pickled() -> None:
    model = peft_model(config())
    classes = {name: type(module) for name, module in model.named_modules()}
    x, before, parameters = call(5)[0], copy.deepcopy(model.state_dict()), list(model.parameters())
    y = model(x)
    report = accelerate(model)
    assert str(report) == f"accelerated, {FUSED}: 2: {', '.join(LAYERS)}"
    assert {type(model.get_submodule(n)).__name__ for n in LAYERS} == {"AcceleratedLinear"}
    assert accelerate(model).accelerated == report.accelerated, "twice is once"
    fast = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), fast) and type(again.get_submodule(LAYERS[0])).__name__ == "AcceleratedLinear"
    assert restore(model) == LAYERS and restore(model) == []
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert torch.equal(model(x), y) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert set(report.left_alone.values()) == {"accelerate() was not called since it was made or restored"}


def test_a_model_without_lora_is_refused() -> None:
    with pytest.raises(ValueError, match="model: got Two without a LoRA layer of PEFT"):
        accelerate(Two())
    assert restore(Two()) == []


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.linear = nn.Embedding(9, K), nn.Conv1d(3, 3, 1), nn.Linear(K, N)
        self.head = nn.Linear(N, 2)

    def forward(self, ids):
        return self.head(self.linear(self.conv(self.embed(ids))))


def test_what_is_no_lora_of_a_linear_layer_is_left_alone_and_told() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        Odd(), LoraConfig(r=2, target_modules=["embed", "conv", "linear"], modules_to_save=["head"], lora_dropout=0.0)
    )
    ids, classes = torch.arange(3)[None], {n: type(m) for n, m in model.named_modules()}
    y = model(ids)
    report = accelerate(model)
    assert list(report.accelerated) == ["base_model.model.linear"]
    assert {name.rpartition(".")[2]: why.split(" is not one of ")[0] for name, why in report.left_alone.items()} == {
        "embed": "Embedding",
        "conv": "Conv1d",
    }
    changed = {name for name, m in model.named_modules() if type(m) is not classes[name]}
    assert changed == {"base_model.model.linear"}
    torch.testing.assert_close(model(ids), y)
    assert "left to PEFT, Embedding is not one of Linear" in str(report)
