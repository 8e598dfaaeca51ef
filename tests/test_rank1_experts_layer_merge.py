"""Rank1ExpertLinear: a fixed choice of its experts merged into the weight, and folded."""

import pytest
import torch
import torch.nn.functional as F
from layers import best, expert_layer, function_inputs, randomize, same_bits, snapshot
from transformers.pytorch_utils import Conv1D

from clora_kernels import Rank1ExpertLinear, merge_rank1_experts
from clora_kernels.modules import adapter
from clora_kernels.reference import rank1_experts as reference
from clora_kernels.testing import assert_parity


def merged_inputs(layer, x, indices, gates=None):
    """The linear layer with a fixed choice for every row, for the parity rule."""
    base = F.linear(x, layer.weight.mT if layer.fan_in_fan_out else layer.weight, layer.bias).detach()
    inputs = {
        k: v.detach().clone() for k, v in (("x", x), ("experts_A", layer.experts_A), ("experts_B", layer.experts_B))
    }
    inputs |= {"indices": indices.expand(len(x), -1), "scaling": 0.7, "base_output": base}
    return inputs if gates is None else inputs | {"gates": gates.expand(len(x), -1)}


@pytest.mark.parametrize("backup", ["device", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_of_the_most_used_and_unmerge_of_every_bit(dtype, backup):
    layer, x = expert_layer(dtype=dtype), torch.randn(6, 37).to(dtype)
    layer(x)
    layer.eval()
    before, y = snapshot(layer), layer(x)
    most = best(layer.activation_counts.tolist(), 5)
    for top in (None, 2, 23):
        layer.merge(backup, top=top)
        chosen = torch.tensor(best(layer.activation_counts.tolist(), 5 if top is None else top))
        expected = merge_rank1_experts(before["weight"], layer.experts_A, layer.experts_B, chosen, scaling=0.7)
        assert layer.merged and "path=merged" in repr(layer) and torch.equal(layer.weight, expected)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) and same_bits(snapshot(layer), before)
        layer.unmerge()
        assert not layer.merged and same_bits(snapshot(layer), before) and torch.equal(layer(x), y)
    assert len(most) == 5 and most != sorted(most), "else an order that is wrong would not show"


def test_a_merged_layer_computes_the_fixed_choice():
    layer, x = expert_layer().eval(), torch.randn(6, 37)
    indices, gates = torch.tensor([7, 3, 3, 22]), torch.tensor([0.5, -1.0, 2.0, 0.1])
    for given in (None, gates):
        inputs = merged_inputs(layer, x, indices, given)
        layer.merge(indices=indices, gates=given)
        assert_parity({"y": layer(x).detach()}, inputs, reference=reference)
        layer.unmerge()


@pytest.mark.parametrize("rows", [1, 7])
def test_merging_in_blocks_of_rows(monkeypatch, rows):
    layer, x = expert_layer().eval(), torch.randn(6, 37)
    inputs = merged_inputs(layer, x, torch.arange(5))
    monkeypatch.setattr(adapter, "MERGE_ROWS", rows)
    layer.merge(top=5)
    assert_parity({"y": layer(x).detach()}, inputs, reference=reference)


@pytest.mark.parametrize("merged", [None, "device", "cpu"])
def test_fold_is_for_good_and_starts_the_pool_anew(merged):
    layer, x = expert_layer(), torch.randn(6, 37)
    layer(x)
    layer.eval()
    before, router = layer.weight, layer.scoring.weight.detach().clone()
    inputs = merged_inputs(layer, x, torch.tensor(best(layer.activation_counts.tolist(), 3)))
    if merged:
        layer.merge(merged, top=3)
        layer.fold()
    else:
        layer.fold(top=3)
    assert not layer.merged and layer.weight is before
    assert not layer.experts_B.any() and not layer.activation_counts.any() and layer.experts_A.abs().max() <= 37**-0.5
    assert not torch.equal(layer.scoring.weight, router)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert_parity({"y": layer(x).detach()}, inputs, reference=reference)


def test_fold_after_a_merge_that_kept_nothing():
    layer = expert_layer().eval()
    layer.merge(None, top=3)
    weight = layer.weight.detach().clone()
    for act in (layer.unmerge, layer.merge, lambda: layer.fold(top=2), layer.state_dict):
        with pytest.raises(RuntimeError, match="backup=None"):
            act()
    layer.fold()
    assert not layer.merged and torch.equal(layer.weight, weight) and not layer.experts_B.any()


def test_a_merge_that_fails_leaves_the_layer_and_what_it_has_merged():
    layer = expert_layer().eval()
    layer.merge(indices=torch.tensor([4]))
    merged, before = layer.weight.detach().clone(), snapshot(layer)
    for kw, error, message in (
        ({"backup": "gpu"}, ValueError, "backup: got 'gpu'"),
        ({"top": 24}, ValueError, "top: got 24, expected an int from 1 to 23"),
        ({"top": 0}, ValueError, "top: got 0"),
        ({"top": 2, "indices": torch.tensor([1])}, ValueError, "top: got 2 with indices"),
        ({"gates": torch.ones(1)}, ValueError, "gates: got a tensor without indices"),
        ({"indices": torch.tensor([[1]])}, ValueError, r"indices: got shape \(1, 1\), expected \(n,\)"),
        ({"indices": torch.tensor([1.0])}, TypeError, r"indices: got dtype torch\.float32"),
        ({"indices": torch.tensor([23])}, IndexError, "got 23, expected 0 <= index < 23"),
        ({"indices": torch.tensor([1]), "gates": torch.ones(2)}, ValueError, r"gates: got shape \(2,\)"),
    ):
        with pytest.raises(error, match=message):
            layer.merge(**kw)
        assert layer.merged and torch.equal(layer.weight, merged)
    layer.unmerge()
    assert same_bits(snapshot(layer), before)
    layer.merge(indices=torch.tensor([4]))
    with pytest.raises(ValueError, match="backup"):
        layer.merge("gpu", top=1)
    layer.fold()
    assert torch.equal(layer.weight, merged), "fold takes what was merged"


def test_conv1d_keeps_its_layout():
    conv = Conv1D(29, 37)
    layer, x = randomize(Rank1ExpertLinear.from_linear(conv, 11, 3, scaling=0.7)).eval(), torch.randn(6, 37)
    assert layer.weight is conv.weight and layer.state_dict()["weight"].shape == (37, 29)
    inputs = function_inputs(layer, x)
    assert torch.equal(inputs["base_output"], F.linear(x, conv.weight.mT, conv.bias))
    assert_parity({"y": layer(x).detach()}, inputs, reference=reference)
    inputs = merged_inputs(layer, x, torch.tensor([2, 9]))
    layer.merge(indices=torch.tensor([2, 9]))
    assert_parity({"y": layer(x).detach()}, inputs, reference=reference)
    layer.unmerge()
    assert type(layer.to_linear()) is Conv1D and torch.equal(layer.to_linear()(x), conv(x))
