"""RoutedLoRAFusedLinear: slices of one linear layer, each with an adapter of its own."""

import pytest
import torch
from layers import OPTIONS, function_inputs, randomize, same_bits, snapshot
from torch import nn
from transformers.pytorch_utils import Conv1D

from clora_kernels import RoutedLoRAFusedLinear
from clora_kernels.testing import assert_parity


@pytest.mark.parametrize("base", [lambda: nn.Linear(16, 24), lambda: Conv1D(24, 16)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fused_slices_equal_separate_layers(options, base):
    torch.manual_seed(0)
    linear, x, slices = base(), torch.randn(3, 5, 16), [(0, 8), (12, 24)]
    layer = randomize(RoutedLoRAFusedLinear.from_linear(linear, 3, slices=slices, **options))
    y, expected = layer(x), linear(x).detach().clone()
    weight = layer.weight.mT if layer.fan_in_fan_out else layer.weight
    rows = layer.lora_B.split([8, 12])
    for j, (start, stop) in enumerate(slices):
        part = {"weight": weight[start:stop], "lora_A": layer.lora_A[3 * j : 3 * j + 3], "lora_B": rows[j]}
        for name in ("routing", "frozen_routing"):
            if getattr(layer, name) is not None:
                part[name] = getattr(layer, name)[j]
        part = {k: v.detach() for k, v in part.items()}
        part = {"x": x, "bias": layer.bias[start:stop].detach(), "scaling": layer.scaling, **part}
        assert_parity({"y": y[..., start:stop].detach()}, part)
    assert torch.equal(y[..., 8:12], expected[..., 8:12])
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.adapter_parameters())
    before, inputs = snapshot(layer), function_inputs(layer, x)
    layer.eval().merge()
    assert_parity({"y": layer(x).detach()}, inputs)
    assert same_bits(snapshot(layer), before)
    layer.unmerge()
    layer.fold_routing()
    assert layer.routing is None
    assert_parity({"y": layer(x).detach()}, inputs)
    assert f"slices={slices}" in repr(layer)


@pytest.mark.parametrize(
    "slices", [[], [(0, 30)], [(4, 8), (0, 4)], [(0, 5), (4, 8)], [(3, 3)], [(-1, 4)], [1], [(0, 2, 4)]], ids=str
)
def test_fused_slices_are_checked(slices):
    with pytest.raises(ValueError, match=r"slices: got"):
        RoutedLoRAFusedLinear(16, 24, 3, slices=slices)
    with pytest.raises(ValueError, match=r"slices: got"):
        RoutedLoRAFusedLinear.from_linear(nn.Linear(16, 24), 3, slices=slices)


def test_constructed_layer_starts_as_a_linear_layer():
    layer, x = RoutedLoRAFusedLinear(16, 24, 3, slices=[(0, 8), (12, 24)], frozen_routing=True), torch.randn(2, 16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.lora_B.shape == (20, 3) and layer.routing.shape == layer.frozen_routing.shape == (2, 3, 3)
    with pytest.raises(ValueError, match="no bank"):
        RoutedLoRAFusedLinear(16, 24, 3, slices=[(0, 8)], routing=4)
