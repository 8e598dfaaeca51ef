"""Parity of a whole model's layers: passes on the right thing, fails on a planted fault, leaves no trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sequences import TARGETS, Net, batch
from torch import nn

from clora_kernels import RoutedLoRALinear
from clora_kernels.continual import CLoRA, assert_model_parity
from clora_kernels.continual import parity as parity_module


def method(**options) -> CLoRA:
    method = CLoRA(Net(), TARGETS, r=4, **options)
    for layer in method.layers.values():
        for tensor in layer.adapter_state_dict().values():
            nn.init.normal_(tensor, std=0.5)
    method.begin_task()
    return method


def loss_of(m: CLoRA):
    x, labels = batch(1, 1)
    return lambda: F.cross_entropy(m.model(x), labels)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_every_layer_and_gradient_is_proved(dtype: torch.dtype | None, dropout_p: float) -> None:
    m = method(dropout_p=dropout_p)
    proved = assert_model_parity(m.model, loss_of(m), dtype)
    assert list(proved) == TARGETS
    for results in proved.values():
        assert {"y", "x", "weight", "lora_A", "lora_B", "routing", "bias"} <= set(results)
        assert all(d.ok for d in results.values())
    assert all(p.grad is None for p in m.model.parameters())
    assert not any(layer._forward_hooks for layer in m.layers.values())


def test_the_arguments_of_a_call_are_part_of_it_and_the_last_call_is_proved(monkeypatch) -> None:
    layer, x = RoutedLoRALinear(6, 5, 4, routing=3), torch.randn(2, 7, 6)
    for tensor in layer.adapter_state_dict().values():
        nn.init.normal_(tensor, std=0.5)
    seen, right = [], parity_module.assert_parity
    monkeypatch.setattr(parity_module, "assert_parity", lambda fn, i, dy: seen.append((i, dy)) or right(fn, i, dy=dy))

    def loss():
        first = layer(x + 1, gate=torch.full((4,), 3.0), routing_index=torch.tensor([0, 0]))
        return first.sum() + (2 * layer(x=x, gate=torch.full((4,), 0.5), routing_index=torch.tensor([2, 1]))).sum()

    assert list(assert_model_parity(layer, loss)) == [""]
    ((inputs, dy),) = seen
    assert torch.equal(inputs["x"], x) and torch.equal(inputs["gate"], torch.full((4,), 0.5)) and (dy == 2).all()
    assert inputs["routing_index"].tolist() == [2, 1]


@pytest.mark.parametrize("fault", ["scaling", "frozen_routing", "lora_B"])
def test_a_planted_fault_is_found(fault: str, monkeypatch) -> None:
    right = parity_module.routed_lora_linear

    def wrong(**arguments):
        return right(**{**arguments, fault: 1.02 * arguments[fault]})

    monkeypatch.setattr(parity_module, "routed_lora_linear", wrong)
    m = method()
    with pytest.raises(AssertionError, match=r"first: .*beyond"):
        assert_model_parity(m.model, loss_of(m))


def test_a_model_without_a_layer_in_the_loss_is_refused() -> None:
    m = method()
    with pytest.raises(ValueError, match="no routed LoRA layer took part"):
        assert_model_parity(m.model, lambda: m.model.out.weight.requires_grad_().sum())
    with pytest.raises(ValueError, match="no routed LoRA layer took part"):
        assert_model_parity(net := Net(), lambda: net(torch.zeros(1, 6)).sum())
