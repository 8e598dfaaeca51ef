"""RoutedLoRALinear: drop-in, merged and unmerged, saved and loaded."""

import copy
import io
import math
import pickle

import pytest
import torch
from layers import OPTIONS, function_inputs, randomize, same_bits, snapshot
from torch import nn
from transformers.pytorch_utils import Conv1D

from clora_kernels import RoutedLoRAFusedLinear, RoutedLoRALinear, routed_lora_linear
from clora_kernels.modules import adapter
from clora_kernels.testing import assert_fidelity, assert_parity


def make(options=None, dtype=torch.float32, **kw):
    torch.manual_seed(0)
    return randomize(RoutedLoRALinear(37, 29, 5, dtype=dtype, **{**(options or OPTIONS[2]), **kw}))


@pytest.mark.parametrize("options", [*OPTIONS, {"routing": 3}], ids=str)
def test_starts_as_the_linear_layer(options):
    torch.manual_seed(0)
    layer, x = RoutedLoRALinear(37, 29, 5, **options), torch.randn(4, 7, 37)
    index = torch.tensor([0, 2, 1, 0]) if options["routing"] == 3 else None
    assert torch.equal(layer(x, routing_index=index), nn.functional.linear(x, layer.weight, layer.bias))
    assert isinstance(layer, nn.Linear) and layer.weight.shape == (29, 37)
    layer, x = layer.bfloat16(), x.bfloat16()  # a bias is added last there
    product = nn.functional.linear(x, layer.weight)
    expected = product if layer.bias is None else product + layer.bias
    assert torch.equal(layer(x, routing_index=index), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer_is_the_function_of_its_parameters(options, dtype):
    layer, x = make(options, dtype), torch.randn(4, 7, 37).to(dtype)
    assert_parity({"y": layer(x).detach()}, function_inputs(layer, x))
    assert layer.lora_A.dtype == torch.float32


def test_adapter_dtype_is_fp32_under_16_bit_and_can_be_chosen():
    assert RoutedLoRALinear(8, 8, 2, dtype=torch.bfloat16).routing.dtype == torch.float32
    assert RoutedLoRALinear(8, 8, 2, dtype=torch.float64).lora_A.dtype == torch.float64
    chosen = RoutedLoRALinear(8, 8, 2, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16, frozen_routing=True)
    assert chosen.lora_B.dtype == chosen.frozen_routing.dtype == torch.bfloat16


def test_gate_index_and_seed_reach_the_function():
    x, gate = torch.randn(4, 7, 37), torch.randn(4, 1, 5)
    layer = make({"routing": 3, "dropout_p": 0.4})
    index, seed = torch.tensor([2, 0, 1, 2]), torch.tensor(7)
    y = layer(x, gate=gate, routing_index=index, dropout_seed=seed)
    options = {"gate": gate, "routing_index": index, "dropout_p": 0.4, "dropout_seed": seed}
    tensors = (layer.weight, layer.lora_A, layer.lora_B, layer.routing, layer.bias)
    assert torch.equal(y, routed_lora_linear(x, *tensors, **options))
    assert not torch.equal(y, layer(x, gate=gate, routing_index=index, dropout_seed=torch.tensor(8)))
    layer.eval()
    assert torch.equal(layer(x, routing_index=index), layer(x, routing_index=index, dropout_seed=seed))


def test_scaling_can_be_a_parameter_that_learns():
    layer = make({"routing": True, "scaling": nn.Parameter(torch.tensor(0.5))})
    layer(torch.randn(3, 37)).square().sum().backward()
    assert layer.scaling.grad.shape == () and layer.scaling.grad != 0
    assert "scaling" in layer.adapter_state_dict() and layer.scaling in set(layer.adapter_parameters())
    assert f"scaling={layer.scaling.item():g}" in repr(layer)


@pytest.mark.parametrize("backup", ["device", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merge_equals_the_layer_and_unmerge_restores_every_bit(options, dtype, backup):
    layer, x = make(options, dtype).eval(), torch.randn(4, 37).to(dtype)
    before, y, inputs = snapshot(layer), layer(x), function_inputs(layer, x)
    layer.merge(backup=backup)
    assert layer.merged and "path=merged" in repr(layer)
    assert_parity({"y": layer(x).detach()}, {"x": x, **merged_inputs(layer)})
    if dtype == torch.float32:  # in 16 bit the merged weight itself is rounded: see the next test
        assert_parity({"y": layer(x).detach()}, inputs)
    assert same_bits(snapshot(layer), before)
    once = layer.weight.detach().clone()
    layer.merge(backup=backup)
    assert torch.equal(layer.weight, once)
    layer.unmerge()
    assert not layer.merged and same_bits(snapshot(layer), before) and torch.equal(layer(x), y)
    layer.unmerge()
    assert same_bits(snapshot(layer), before)


def merged_inputs(layer):
    """A routed LoRA that adds nothing, around the merged weight: the reference of a plain linear layer."""
    zero = {"lora_A": torch.ones(1, layer.in_features), "lora_B": torch.zeros(layer.out_features, 1)}
    return {"weight": layer.weight.detach(), "bias": layer.bias.detach(), **zero}


def test_merged_weight_is_rounded_once():
    layer = make(OPTIONS[2], torch.bfloat16).eval()
    state = {k: v.double() for k, v in snapshot(layer).items()}
    total = state["routing"] + state["frozen_routing"]
    exact = state["weight"] + 0.5 * state["lora_B"] @ total.mT @ state["lora_A"]
    layer.merge()
    spacing = torch.finfo(torch.bfloat16).eps * exact.abs()
    assert ((layer.weight - exact).abs() <= spacing / 2 * (1 + 2**-10)).all()


def test_merge_after_learning_starts_from_the_original():
    layer = make().eval()
    layer.merge()
    first = layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B.zero_()
    layer.merge(backup="cpu")
    assert not torch.equal(layer.weight, first)
    merged = layer.weight.detach().clone()
    layer.unmerge()
    assert torch.equal(merged, layer.weight)


def test_merge_without_backup_cannot_be_undone_or_saved():
    layer = make().eval()
    layer.merge(backup=None)
    for undo in (layer.unmerge, layer.state_dict, layer.merge):
        with pytest.raises(RuntimeError, match="backup=None"):
            undo()
    assert layer.merged
    weight = layer.weight.detach().clone()
    layer.fold()
    assert not layer.merged and torch.equal(layer.weight, weight) and not layer.lora_B.any()
    assert torch.equal(layer.state_dict()["weight"], weight)


def test_merge_on_device_leaves_a_tied_weight_alone():
    linear = nn.Linear(37, 29)
    layer = randomize(RoutedLoRALinear.from_linear(linear, 5)).eval()
    before = linear.weight.detach().clone()
    layer.merge()
    assert torch.equal(linear.weight, before) and not torch.equal(layer.weight, before)
    layer.unmerge()
    assert layer.weight is linear.weight


def test_merged_layer_refuses_what_it_cannot_do():
    layer, x = make().eval(), torch.randn(2, 37)
    layer.merge()
    with pytest.raises(ValueError, match=r"gate: got a tensor for a merged layer"):
        layer(x, gate=torch.ones(5))
    with pytest.raises(RuntimeError, match=r"unmerge\(\)"):
        layer.train()(x)
    with pytest.raises(RuntimeError, match=r"unmerge\(\)"):
        layer.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"unmerge\(\)"):
        layer.load_adapter_state_dict(layer.adapter_state_dict())
    with pytest.raises(ValueError, match="backup: got 'gpu'"):
        layer.merge(backup="gpu")
    layer.unmerge()
    with pytest.raises(ValueError, match="bank of 3"):
        make({"routing": 3}).merge()


def test_backup_moves_with_the_layer():
    layer = make().eval()
    layer.merge()
    layer.to(torch.float64)
    layer.unmerge()
    assert layer.weight.dtype == torch.float64


def test_fold_is_permanent_and_starts_anew():
    layer, x = make().eval(), torch.randn(6, 37)
    inputs = function_inputs(layer, x)
    layer.fold()
    assert not layer.merged and not layer.lora_B.any() and not layer.frozen_routing.any()
    assert torch.equal(layer.routing, torch.eye(5))
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert_parity({"y": layer(x).detach()}, inputs)


def test_state_dict_round_trip_pickle_and_deepcopy():
    layer, x = make(), torch.randn(3, 37)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make(OPTIONS[2])
    other.reset_adapter()
    other.load_state_dict(torch.load(file))
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_a_plain_checkpoint_loads_strictly_and_keeps_the_adapter():
    layer, linear = make(), nn.Linear(37, 29)
    adapter = {k: v.clone() for k, v in layer.adapter_state_dict().items()}
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight) and same_bits(layer.adapter_state_dict(), adapter)
    partial = {**linear.state_dict(), "lora_A": adapter["lora_A"]}
    with pytest.raises(RuntimeError, match="lora_B"):
        layer.load_state_dict(partial)


def test_adapter_state_dict_loads_strictly_or_not_at_all():
    layer = make()
    before = {k: v.clone() for k, v in layer.adapter_state_dict().items()}
    good = {k: torch.randn_like(v) for k, v in before.items()}
    missing = {k: v for k, v in good.items() if k != "routing"}
    for bad, message in (
        (missing, r"missing \['routing'\]"),
        ({**good, "lora_C": good["lora_A"]}, r"unexpected \['lora_C'\]"),
        ({**good, "routing": torch.randn(6, 6)}, r"state_dict\['routing'\]: got shape \(6, 6\), expected \(5, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.load_adapter_state_dict(bad)
        assert same_bits(layer.adapter_state_dict(), before)
    layer.load_adapter_state_dict(good)
    assert same_bits(layer.adapter_state_dict(), good)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv1d_keeps_its_layout(dtype):
    conv = Conv1D(29, 37).to(dtype)
    layer, x = randomize(RoutedLoRALinear.from_linear(conv, 5, frozen_routing=True)), torch.randn(3, 4, 37).to(dtype)
    assert layer.weight is conv.weight and layer.state_dict()["weight"].shape == (37, 29)
    inputs = function_inputs(layer, x)
    dy = torch.randn(3, 4, 29).to(dtype)
    assert_parity(routed_lora_linear, inputs, dy=dy)
    assert_fidelity(layer(x), **inputs)
    before = snapshot(layer)
    layer.eval().merge()
    assert layer.weight.shape == (37, 29) and same_bits(snapshot(layer), before)
    layer.unmerge()
    assert type(layer.to_linear()) is Conv1D and torch.equal(layer.to_linear()(x), conv(x))


def test_constructors_name_what_is_wrong():
    for kw, message in (
        ({"r": 0}, "r: got 0"),
        ({"r": 2.5}, "r: got 2.5"),
        ({"r": True}, "r: got True"),
        ({"r": 2, "dropout_p": 1.5}, "dropout_p: got 1.5"),
        ({"r": 2, "scaling": torch.ones(2)}, "scaling: got torch.float32 of shape"),
        ({"r": 2, "adapter_dtype": torch.int32}, r"adapter_dtype: got torch\.int32"),
        ({"r": 2, "routing": False, "frozen_routing": True}, "frozen_routing: got True"),
        ({"r": 2, "routing": 0}, "routing: got 0"),
        ({"r": 2, "backend": "cuda"}, "backend: got 'cuda'"),
    ):
        with pytest.raises(ValueError, match=message):
            RoutedLoRALinear.from_linear(nn.Linear(4, 4), **kw)
    for kw, message in (({"dropout_p": "a"}, "dropout_p: got str"), ({"scaling": "a"}, "scaling: got str")):
        with pytest.raises(TypeError, match=message):
            RoutedLoRALinear.from_linear(nn.Linear(4, 4), 2, **kw)
    with pytest.raises(TypeError, match="linear: got Conv2d"):
        RoutedLoRALinear.from_linear(nn.Conv2d(3, 3, 1), 2)
    with pytest.raises(TypeError, match=r"neither nn\.Linear nor Conv1D"):
        RoutedLoRALinear.from_linear(type("Odd", (nn.Linear,), {})(4, 4), 2)
    with pytest.raises(ValueError, match="no bank"):
        RoutedLoRAFusedLinear.from_linear(nn.Linear(4, 4), 2, slices=[(0, 2)], routing=3)


def test_lora_A_starts_kaiming_uniform():
    torch.manual_seed(0)
    A, limit = RoutedLoRALinear(400, 8, 16).lora_A, 1 / math.sqrt(400)
    assert A.abs().max() <= limit and (A.abs() > 0.99 * limit).any() and A.unique().numel() > 6000


@pytest.mark.parametrize("rows", [1, 7])
def test_merging_in_blocks_of_rows(monkeypatch, rows):
    whole, blocks = make().eval(), make().eval()
    whole.merge()
    monkeypatch.setattr(adapter, "MERGE_ROWS", rows)
    blocks.merge()
    torch.testing.assert_close(blocks.weight, whole.weight)
