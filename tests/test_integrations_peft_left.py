"""What accelerated layers leave to PEFT's own forward, call by call, and batches whose samples name their adapters."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from peft_models import WIDTHS, assert_as_good, config, peft_model, results
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from clora_kernels.integrations.peft import accelerate, layers, restore

K, N = WIDTHS
NAME = "base_model.model.linear"


@pytest.fixture(autouse=True)
def told_anew(monkeypatch) -> None:
    """A reason is warned of once in a process."""
    monkeypatch.setattr(layers, "_told", set())


def call(*lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*lead, K, generator=generator), torch.randn(*lead, N, generator=generator)


def same_as_peft(model: nn.Module, other: nn.Module, **options) -> None:
    """Every result to the bit."""
    x, dy = call(5, 3)
    theirs, ours = results(model, x, dy, **options), results(other, x, dy, **options)
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def layer_of(model: nn.Module) -> nn.Module:
    return model.get_submodule(NAME)


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def hook(module: nn.Module, *_: object) -> None:
    return None


def replaced(layer: nn.Module, part: str, module: nn.Module) -> None:
    getattr(layer, part)["first"] = module


def patched(module: nn.Module) -> None:
    module.forward = type(module).forward.__get__(module)


CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "a hook on A": (lambda m: m.lora_A["first"].register_forward_hook(hook), "carries hooks or a patched forward"),
    "a hook before B": (lambda m: m.lora_B["first"].register_forward_pre_hook(hook), "carries hooks"),
    "a hook on dropout": (lambda m: m.lora_dropout["first"].register_full_backward_hook(hook), "carries hooks"),
    "a hook of backward": (lambda m: m.lora_B["first"].register_full_backward_pre_hook(hook), "carries hooks"),
    "a patched forward": (lambda m: patched(m.lora_B["first"]), "carries hooks or a patched forward"),
    "another class": (lambda m: replaced(m, "lora_A", Scaled(K, 4, bias=False)), "made of Scaled, not nn.Linear"),
    "a bias": (lambda m: replaced(m, "lora_B", nn.Linear(4, N)), "adapter 'first' has a bias"),
    "another dropout": (lambda m: replaced(m, "lora_dropout", nn.AlphaDropout(0.0)), "drops by AlphaDropout"),
    "a parametrised weight": (
        lambda m: nn.utils.parametrizations.weight_norm(m.lora_A["first"]),
        "made of ParametrizedLinear|holds no plain weight",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_changed_later_is_peft_s_and_told(change: str) -> None:
    model = peft_model(config())
    other = copy.deepcopy(model)
    report = accelerate(other)
    act, why = CHANGES[change]
    for m in (model, other):
        torch.manual_seed(3)
        act(layer_of(m))
    assert list(report.left_alone) == [NAME] and list(report.accelerated) == ["base_model.model.conv"]
    with pytest.warns(UserWarning, match=f"goes through PEFT's own forward: .*({why})"):
        other(call(2)[0])
    x = call(4)[0]
    assert torch.equal(layer_of(other)(x), layer_of(model)(x))  # and no second warning
    assert re.search(why, report.fell_back[NAME]) and "left a call to PEFT" in str(report)
    assert NAME in restore(other) and not report.fell_back


def test_variants_are_left_alone() -> None:
    model = peft_model(config(), config(use_dora=True))
    other = copy.deepcopy(model)
    report = accelerate(other)
    assert not report.left_alone
    for m in (model, other):
        m.set_adapter("second")
    assert set(report.left_alone.values()) == {"adapter 'second' is a DoraLinearVariant, not plain LoRA"}
    with pytest.warns(UserWarning, match="DoraLinearVariant"):
        same_as_peft(model, other)
    for m in (model, other):
        m.set_adapter("first")
    assert not report.left_alone and set(report.fell_back) == {NAME, "base_model.model.conv"}


def test_a_lora_with_a_bias_is_left_alone() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(K, N)), LoraConfig(r=4, target_modules=["0"], lora_bias=True))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].bias)
    other = copy.deepcopy(model)
    report = accelerate(other)
    assert report.left_alone == {"base_model.model.0": "adapter 'default' has a bias"}
    with pytest.warns(UserWarning, match="has a bias"):
        same_as_peft(model, other)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapter_on_another_device_is_peft_s(part: str) -> None:
    model = peft_model(config())
    report = accelerate(model)
    getattr(layer_of(model), part).to("meta" if call(1)[0].is_cpu else "cpu")
    with pytest.warns(UserWarning, match="an adapter is on another device than x"):
        layer_of(model)(call(2)[0])  # what torch makes of the two devices is its own
    assert report.fell_back == {NAME: "an adapter is on another device than x"}


def test_an_x_that_holds_other_tensors_is_peft_s() -> None:
    model = peft_model(config())
    other = copy.deepcopy(model)
    report, x = accelerate(other), call(2)[0]
    with pytest.warns(UserWarning, match="x is a TwoTensor"):
        y = layer_of(other)(TwoTensor(x, 2 * x))
    assert torch.equal(y.a, layer_of(model)(x)) and torch.equal(y.b, layer_of(model)(2 * x))
    assert report.fell_back == {NAME: "x is a TwoTensor"}


@pytest.mark.parametrize("way", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_all_modules_see_what_they_saw(way: str) -> None:
    model = peft_model(config())
    accelerate(model)
    seen: list[type] = []
    register = getattr(nn.modules.module, f"register_module_{way}")
    handle = register(lambda m, *_: seen.append(type(m)) or None)
    try:
        with pytest.warns(UserWarning, match="hooks of all modules are registered"):
            model(call(2)[0].requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert seen.count(nn.Linear) >= 4  # lora_A and lora_B of both layers


@pytest.mark.parametrize("how", ["hooked", "patched", "another class"])
def test_a_base_that_is_no_plain_linear_layer_is_called(how: str) -> None:
    model = peft_model(config())
    layer = layer_of(model)
    if how == "another class":
        base = Scaled(K, N)
        base.load_state_dict(layer.base_layer.state_dict())
        layer.base_layer = base
    elif how == "patched":
        base = layer.base_layer
        base.forward = lambda x: 3 * nn.functional.linear(x, base.weight)
    else:
        layer.base_layer.register_forward_hook(lambda m, args, y: 2 * y)
    alone = copy.deepcopy(layer)
    report = accelerate(alone)
    assert next(iter(report.accelerated.values())).startswith("on the output of its base layer (")
    x, dy = call(6)
    for name, value in results(layer, x, dy).items():
        torch.testing.assert_close(results(alone, x, dy)[name], value, msg=name)
    assert not report.fell_back


def test_further_arguments_reach_the_base_layer() -> None:
    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor, times: int = 1) -> torch.Tensor:
            return times * super().forward(x)

    model = peft_model(config())
    layer = layer_of(model)
    layer.base_layer.__class__ = Twice
    expected = layer(call(3)[0], times=2)
    accelerate(layer)
    with pytest.warns(UserWarning, match="the layer is called with further arguments"):
        assert torch.equal(layer(call(3)[0], times=2), expected)
    assert torch.equal(layer(call(3)[0], 2), expected)


NAMES = ["first", "second", "__base__", "first", "third", "elsewhere"]


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
def test_samples_that_name_their_adapters_are_one_call(lead: tuple[int, ...], monkeypatch) -> None:
    model = peft_model(config(lora_dropout=0.3), config(r=2, lora_alpha=9), config(r=7)).eval()
    model.base_model.set_adapter(["first", "second", "third"])  # their gradients are wanted
    other = copy.deepcopy(model)
    report, calls = accelerate(other), []
    monkeypatch.setattr(
        layers, "routed_lora_linear", lambda *a, f=layers.routed_lora_linear, **k: calls.append(1) or f(*a, **k)
    )
    x, dy = call(6, *lead)
    names = [name for name in NAMES if name != "elsewhere"] + ["second"]
    theirs, ours = (results(m.base_model.model, x, dy, adapter_names=names) for m in (model, other))
    assert theirs.keys() == ours.keys() and len(calls) == 2 and not report.fell_back
    wide = copy.deepcopy(model).double()
    truth = results(wide.base_model.model, x.double(), dy.double(), adapter_names=names)
    for name, value in ours.items():
        err = [float((v.double() - truth[name]).abs().max()) for v in (value, theirs[name])]
        assert err[0] <= 2 * err[1] + 2**-23 * float(truth[name].abs().max()), name


def test_one_adapter_named_by_all_is_that_adapter() -> None:
    model = peft_model(config(), config(r=2)).eval()
    other = copy.deepcopy(model)
    accelerate(other)
    for m in (model, other):
        m.set_adapter("second")
    assert_as_good(model, other, *call(4, 3))
    torch.testing.assert_close(
        other.base_model.model(call(4, 3)[0], adapter_names=["second"] * 4), other(call(4, 3)[0])
    )


@pytest.mark.parametrize("why", ["these drop", "more than 256 ranks"])
def test_named_adapters_that_are_left_to_peft(why: str) -> None:
    configs = [config(lora_dropout=0.5), config()] if why == "these drop" else [config(r=200), config(r=57)]
    model = peft_model(*configs).train(why == "these drop")
    other = copy.deepcopy(model)
    report, x = accelerate(other), call(3)[0]
    for m in (model, other):
        torch.manual_seed(5)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            m.names = m.base_model.model(x, adapter_names=["first", "second", "first"])
    # The adapters of a batch are a set to PEFT: whichever comes first draws first.
    if why != "these drop":
        assert torch.equal(model.names, other.names)
    assert why in report.fell_back[NAME]


def test_what_peft_refuses_is_refused() -> None:
    model = peft_model(config())
    accelerate(model)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model.base_model.model(call(3)[0], adapter_names=["first"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        model.base_model.model(call(3)[0], adapter_names=["first"] * 3)
