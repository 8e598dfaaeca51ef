"""What a method carries beside its adapters: parameters of its own, folds, adapters for tests only, listeners."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sequences import TARGETS, Net, batch, learn, train
from torch import Tensor, nn

from clora_kernels import RoutedLoRALinear
from clora_kernels.continual import CosineHead, SequentialLoRA, load_run, save_run


class Folding(SequentialLoRA):
    """LoRA that goes into the weights after each task, with a parameter of its own and a look at what was folded."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, TARGETS, **options)
        self.own["strength"] = nn.Parameter(torch.ones(2))
        self.loaded = 0

    def extra_losses(self) -> dict[str, Tensor]:
        return {"strength": (self.own["strength"] * self.layers["first"].lora_A.sum()).sum()}

    def on_task_end(self) -> dict[str, float | None]:
        self.fold_layers(self.task)
        return {"folds": float(len(self.folded(self.task)))}

    def on_load(self) -> None:
        self.loaded += 1


def state_of(method: SequentialLoRA) -> dict[str, Tensor]:
    model = {f"model.{k}": v for k, v in method.model.state_dict().items()}
    return {k: v.clone() for k, v in {**method.state_dict(), **model}.items()}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in expected)


def test_own_parameters_learn_and_are_counted() -> None:
    method = Folding(Net(), r=2)
    reports = learn(method, 1)
    assert reports[0].trainable == 2 * (6 + 9) + 2 * (9 + 5) + 2
    assert not torch.equal(method.own["strength"], torch.ones(2))
    assert reports[0].measures == {"folds": 2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_folds_again_to_the_last_bit(dtype: torch.dtype, tmp_path) -> None:
    base = Net().to(dtype)

    def step(method: Folding, number: int) -> None:
        x, labels = batch(method.task, number)
        optimizer = torch.optim.SGD(method.param_groups(0.1))
        method.training_step(x, lambda: F.cross_entropy(method.model(x.to(dtype)).float(), labels), optimizer)

    method = Folding(copy.deepcopy(base), r=2)
    for number in range(3):
        method.begin_task()
        step(method, number)
        if number < 2:
            method.end_task()
    assert not torch.equal(method.model.first.weight, base.first.weight)
    path, expected = save_run(tmp_path / "run", method), state_of(method)
    resumed = Folding(copy.deepcopy(base), r=2)
    load_run(path, resumed).restore()
    assert same(state_of(resumed), expected) and resumed.loaded == 1
    for m in (method, resumed):
        torch.manual_seed(0)
        step(m, 5)
        m.end_task()
    assert same(state_of(resumed), state_of(method))
    with pytest.raises(RuntimeError, match="weights hold folded adapters already"):
        resumed.load_state_dict(method.state_dict())
    assert same(state_of(resumed), state_of(method)) and resumed.loaded == 1


def test_a_state_without_folds_is_no_state_of_a_model_that_has_them() -> None:
    method, fresh = Folding(Net(), r=2), Folding(Net(), r=2)
    learn(method, 1)
    with pytest.raises(RuntimeError, match="attach the method to the model as it was before the first task"):
        method.load_state_dict(fresh.state_dict())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("own.strength"), r"missing \['own.strength'\]"),
        (lambda s: s.update({"own.other": torch.ones(1)}), r"unexpected \['own.other'\]"),
        (lambda s: s.update({"own.strength": torch.ones(3)}), r"own.strength: got shape \(3,\), expected \(2,\)"),
        (
            lambda s: s.update({"kept.folded.1.first.lora_A": torch.ones(3)}),
            r"state_dict\['lora_A'\]: got shape \(3,\)",
        ),
        (lambda s: s.update({"kept.folded.1.first.lora_C": torch.ones(3)}), r"unexpected \['lora_C'\]"),
        (lambda s: s.pop("task"), r"state: missing \['task'\]"),
        (lambda s: s.update({"layers.third.lora_A": torch.ones(3)}), r"unexpected \['layers.third.lora_A'\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(change, told) -> None:
    method, other = Folding(Net(), r=2), Folding(Net(), r=2)
    learn(method, 2)
    state, before = dict(method.state_dict()), state_of(other)
    change(state)
    with pytest.raises(ValueError, match=told):
        other.load_state_dict(state)
    assert same(state_of(other), before)


class TwoViews(SequentialLoRA):
    """Tests with other adapters than it trains; two views."""

    def views(self) -> list[int | None]:
        return [1, 2]

    def tested_adapters(self, view: int | None) -> dict[str, dict[str, Tensor]]:
        assert view is not None
        return {"first": {"lora_B": torch.full_like(self.layers["first"].lora_B, float(view))}}


def test_a_test_sees_the_adapters_of_its_view_and_training_those_that_learn() -> None:
    method = TwoViews(Net(), TARGETS, r=2)
    learn(method, 1)
    before, parameters = state_of(method), list(method.parameters())
    x, _ = batch(9, 9)
    outputs = method.outputs(x)
    for view, output in zip((1, 2), outputs, strict=True):
        plain = method.inference_model(view)
        assert torch.equal(plain(x), output) and not output.requires_grad
        layer = method.layers["first"]
        merged = layer.weight + view * torch.ones_like(layer.lora_B) @ layer.lora_A
        torch.testing.assert_close(plain.first.weight, merged)
    assert not torch.equal(*outputs)
    assert torch.equal(method.inference_model()(x), outputs[-1]), "no view is the last"
    assert same(state_of(method), before)
    assert all(p is q for p, q in zip(method.parameters(), parameters, strict=True))
    with pytest.raises(ValueError, match=r"view: got 3, expected one of \[1, 2\]"), method.inference(3):
        pass
    with pytest.raises(ValueError, match=r"view: got 1, expected one of \[None\]"):
        SequentialLoRA(Net(), TARGETS, r=2).inference_model(1)


def test_adapters_come_back_when_a_test_fails() -> None:
    method = TwoViews(Net(), TARGETS, r=2)
    parameter = method.layers["first"].lora_B
    with pytest.raises(KeyError), method.inference(1):
        assert method.layers["first"].merged
        raise KeyError
    wrong = {"second": {"lora_A": torch.zeros(2, 9)}, "first": {"lora_B": torch.zeros(3, 3)}}
    before = method.layers["second"].lora_A
    with pytest.raises(ValueError, match=r"adapters\['first'\]\['lora_B'\]: got shape \(3, 3\), expected \(9, 2\)"):
        with method.with_adapters(wrong):
            raise AssertionError
    assert method.layers["first"].lora_B is parameter and method.layers["second"].lora_A is before
    assert method.model.training and not method.layers["first"].merged


def test_a_test_within_a_test_or_of_a_merged_model_is_refused() -> None:
    method = SequentialLoRA(Net(), TARGETS, r=2)
    x, _ = batch(9, 9)
    with method.inference():
        with pytest.raises(RuntimeError, match="model: got merged adapters, expected unmerged ones"):
            method.outputs(x)
        assert all(layer.merged for layer in method.layers.values())
    method.layers["first"].merge()
    with pytest.raises(RuntimeError, match="model: got merged adapters"):
        method.inference_model()
    assert method.layers["first"].merged and method.model.training


def test_a_target_without_a_layer_is_told() -> None:
    with pytest.warns(UserWarning, match="targets: 'third' matched no layer"):
        method = SequentialLoRA(Net(), ["first", "third"], r=2)
    assert list(method.layers) == ["first"]


def test_a_layer_that_is_left_alone_is_told_with_the_reason() -> None:
    model = Net()
    model.first.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="targets: first was left alone: it carries hooks") as caught:
        method = SequentialLoRA(model, TARGETS, r=2)
    assert len(caught) == 1 and list(method.layers) == ["second"] and type(model.first) is nn.Linear


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping"])
def test_a_batch_is_a_tensor_or_the_model_s_arguments(kind: str) -> None:
    method = SequentialLoRA(Net(), TARGETS, r=2)
    x, _ = batch(1, 1)
    inputs = {"tensor": x, "tuple": (x,), "mapping": {"x": x}}[kind]
    (output,) = method.outputs(inputs)
    assert torch.equal(output, method.model(x))


def test_listeners_hear_what_happens() -> None:
    method, heard = SequentialLoRA(Net(), TARGETS, r=2), []
    method.listeners.append(lambda event, task, values: heard.append((event, task, dict(values))))
    (report,) = learn(method, 1)
    assert [(event, task) for event, task, _ in heard] == [("begin", 1), *[("step", 1)] * 10, ("end", 1)]
    assert all(set(values) == {"task"} and values["task"].shape == () for _, _, values in heard[1:-1])
    assert heard[-1][2] == {"trainable": report.trainable, "stored": report.stored}


def test_the_head_of_a_task() -> None:
    method, head = SequentialLoRA(Net(), TARGETS, r=2), CosineHead(3, 2)
    assert method.head is None
    method.begin_task(head)
    assert method.head is head
    train(method, torch.optim.SGD(method.param_groups(0.1)), 1, range(1))
    method.end_task()
    assert method.head is None
    method.begin_task()
    assert method.head is None


def test_a_task_that_cannot_start_is_not_begun() -> None:
    class Stuck(SequentialLoRA):
        def on_task_start(self) -> None:
            raise KeyError("nothing to start with")

    method = Stuck(Net(), TARGETS, r=2)
    with pytest.raises(KeyError):
        method.begin_task(nn.Identity())
    assert (method.task, method.in_task, method.head) == (0, False, None)
    assert isinstance(method.layers["first"], RoutedLoRALinear)
