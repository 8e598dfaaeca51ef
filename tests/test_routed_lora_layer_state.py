"""RoutedLoRALinear beside what nn.Module does: meta device, dtypes, parametrisations, inference mode, repr, tracing."""

import numpy as np
import pytest
import torch
from layers import randomize, same_bits, snapshot
from torch import nn
from torch.nn.utils import parametrize

from clora_kernels import RoutedLoRAFusedLinear, RoutedLoRALinear, explain, extension
from clora_kernels.dispatch.choice import Choice


def make(**options):
    torch.manual_seed(0)
    return randomize(RoutedLoRALinear(12, 10, 3, **{"frozen_routing": True, **options}))


@pytest.mark.parametrize("options", [{"routing": False, "frozen_routing": False}, {}, {"routing": 2}], ids=str)
def test_a_layer_made_on_meta_starts_by_reset_parameters(options):
    torch.manual_seed(0)
    there = RoutedLoRALinear(12, 10, 3, **{"frozen_routing": True, **options})
    layer = RoutedLoRALinear(12, 10, 3, device="meta", **{"frozen_routing": True, **options}).to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(float("nan"))
    torch.manual_seed(0)
    layer.reset_parameters()
    assert same_bits(layer.state_dict(), there.state_dict())


def test_a_plain_checkpoint_does_not_hide_an_adapter_that_is_still_on_meta():
    layer = RoutedLoRALinear(12, 10, 3, device="meta")
    plain = nn.Linear(12, 10).state_dict()
    with pytest.raises(RuntimeError, match="lora_A"):
        layer.load_state_dict(plain, assign=True)
    missing, unexpected = layer.load_state_dict(plain, assign=True, strict=False)
    assert missing == ["lora_A", "lora_B", "routing"] and unexpected == [] and not layer.weight.is_meta


def test_a_backup_on_the_cpu_takes_the_layers_dtype():
    layer = make().eval()
    expected = snapshot(layer)["weight"].bfloat16()
    layer.merge("cpu")
    layer.bfloat16()
    assert torch.equal(layer.state_dict()["weight"], expected)
    layer.unmerge()
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("made_in", [False, True])
@pytest.mark.parametrize("backup", ["device", "cpu"])
def test_a_merge_in_inference_mode_serves_training_of_what_is_below(backup, made_in):
    with torch.inference_mode(made_in):
        layer = make().eval()
        before = snapshot(layer)
    with torch.inference_mode():
        layer.merge(backup)
    x = torch.randn(2, 12, requires_grad=True)
    if backup == "device" and not made_in:
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 12))
    with torch.inference_mode():
        layer.unmerge()
    assert same_bits(snapshot(layer), before)


@pytest.mark.parametrize("fused", [False, True])
def test_a_parametrized_weight_is_not_merged(fused):
    layer = randomize(RoutedLoRAFusedLinear(12, 10, 3, slices=[(0, 4)])).eval() if fused else make().eval()
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    x = torch.randn(2, 12)
    y = layer(x)
    for act in (layer.merge, layer.fold):
        with pytest.raises(ValueError, match="weight: got a parametrized one"):
            act()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_repr_of_a_layer_whose_backend_cannot_run(backend, monkeypatch):
    if backend == "triton":
        monkeypatch.setattr("clora_kernels.dispatch.routed_lora._why_not_triton", lambda *_: "its kernels run on a GPU")
    layer = RoutedLoRALinear(33, 9, 4, backend=backend)
    assert f"path={backend} (unavailable)" in repr(nn.Sequential(layer))
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot run"):
        layer(torch.randn(2, 33))


def test_the_repr_of_a_layer_whose_backend_runs():
    layer = RoutedLoRALinear(33, 9, 4, backend="native", routing=False)
    there = extension.has_op("routed_lora_lay_down", "cpu")
    assert repr(layer).endswith(f"path=native{'' if there else ' (unavailable)'})")


@pytest.mark.parametrize(
    ("K", "r", "routing", "path"),
    [(8, 4, False, "composite or native or aten, by size"), (8, 4, True, "aten"), (1 << 20, 16, False, "aten")],
)
def test_the_repr_names_the_backends_that_calls_take(K, r, routing, path, monkeypatch):
    """A plain layer is computed by another backend where there is little to compute; in a wide one there never is."""
    layer = RoutedLoRALinear(K, 6, r, routing=routing)
    taken = dict.fromkeys(explain(layer, torch.zeros(1, 1).expand(M, K)).backend for M in (1, 1 << 16, 1 << 30))
    assert repr(layer).endswith(f"path={' or '.join(taken)}{', by size' if len(taken) > 1 else ''})")
    if extension.has_op("routed_lora_lay_down", "cpu"):
        assert repr(layer).endswith(f"path={path})")
    monkeypatch.setattr(extension, "_kernels", frozenset())
    assert repr(layer).endswith(f"path={path.replace('native or ', '')})")


def test_the_repr_asks_the_table_of_the_calls_that_drop(monkeypatch):
    layer = RoutedLoRALinear(8, 6, 4, dropout_p=0.5)
    asked = []
    monkeypatch.setattr(
        "clora_kernels.modules.routed_lora.layer.choose",
        lambda x, projections, backend: asked.append(projections[0].threshold is not None) or Choice("triton", "", ""),
    )
    assert repr(layer).endswith("path=triton)") and repr(layer.eval()).endswith("path=triton)")
    assert asked == [True] * 31 + [False] * 31


def test_the_rank_is_any_integer_and_says_so():
    assert RoutedLoRALinear(4, 4, np.int64(2)).lora_A.shape == (2, 4)
    assert type(RoutedLoRALinear(4, 4, np.int64(2)).r) is int
    for rank in (4.0, "4", None):
        with pytest.raises(ValueError, match=f"r: got {rank!r}, expected a rank of at least 1, an int"):
            RoutedLoRALinear(4, 4, rank)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_dtype_that_the_function_refuses_makes_no_layer(dtype):
    with pytest.raises(ValueError, match=f"dtype: got {dtype}, expected one of torch.float32"):
        RoutedLoRALinear(4, 4, 2, dtype=dtype)


@pytest.mark.parametrize("slices", [[(0.5, 3)], [("a", "b")], 5, None], ids=str)
def test_slices_are_pairs_of_ints(slices):
    with pytest.raises(ValueError, match=r"slices: got .*, expected \(start, stop\) pairs of ints"):
        RoutedLoRAFusedLinear(8, 8, 2, slices=slices)


def test_an_adapter_that_is_no_mapping():
    with pytest.raises(TypeError, match="state_dict: got list, expected a mapping"):
        make().load_adapter_state_dict([torch.ones(2)])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_raises_and_the_reference_can_be_traced():
    x = torch.randn(2, 12)
    with pytest.raises(RuntimeError, match="Tracing a list of"):
        torch.jit.trace(make(), x)
    layer = make(backend="reference")
    traced = torch.jit.trace(layer, x)
    assert torch.equal(traced(x + 1), layer(x + 1))


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [
        (np.zeros((10, 3)), TypeError, "got ndarray, expected a Tensor"),
        ([[0.0] * 3] * 10, TypeError, "got list, expected a Tensor"),
        (torch.zeros(10, 3, dtype=torch.complex64), TypeError, r"got dtype torch\.complex64"),
        (torch.zeros(10, 3, dtype=torch.int64), TypeError, r"got dtype torch\.int64, expected torch\.float32"),
        (torch.zeros(10, 3, device="meta"), ValueError, "got a tensor on meta"),
    ],
)
def test_an_adapter_that_holds_anything_else_is_refused_whole(value, error, told):
    layer = make()
    before, new = snapshot(layer), {k: torch.zeros_like(v) for k, v in layer.adapter_state_dict().items()}
    with pytest.raises(error, match=rf"state_dict\['lora_B'\]: {told}"):
        layer.load_adapter_state_dict({**new, "lora_B": value})
    assert same_bits(snapshot(layer), before)


@pytest.mark.parametrize("backup", ["device", "cpu", None])
def test_a_merged_layer_goes_to_meta_and_comes_from_there(backup):
    layer = make()
    layer.eval().merge(backup=backup)
    layer.to("meta")
    assert layer.merged and all(t.is_meta for t in (layer.weight, layer.lora_A))
    layer.to_empty(device="cpu")
    assert not any(t.is_meta for t in layer.parameters())


def test_a_merged_layer_does_not_start_anew():
    layer = make()
    layer.merge()
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r"layer is merged: call unmerge\(\) before its adapter starts anew"):
        layer.reset_adapter()
    assert same_bits(snapshot(layer), before)


def test_a_scaling_that_learns_is_a_parameter():
    with pytest.raises(ValueError, match=r"scaling: got a tensor that learns, expected an nn\.Parameter"):
        RoutedLoRALinear(4, 3, 2, scaling=torch.tensor(2.0, requires_grad=True))
