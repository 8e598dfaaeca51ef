"""A plain layer that is seen at a glance to be right and small has the bits of a closer look; all else gets one."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from native import plain
from strategies import dy_for
from torch.autograd import forward_ad

from clora_kernels import RoutedLoRALinear, explain, routed_lora_linear
from clora_kernels.autograd.routed_lora import functions
from clora_kernels.kernels.routed_lora import composite, layer
from clora_kernels.testing import assert_parity, dispatched, evaluate, saved_tensors

NAMES = ("x", "weight", "lora_A", "lora_B", "bias", "scaling")


GLANCES = {
    "plain": {},
    "no bias": {"bias": None},
    "dropout": {"dropout_p": 0.25},
    "all drops": {"dropout_p": 1.0},
    "not training": {"dropout_p": 0.25, "training": False},
}


@pytest.mark.parametrize("options", GLANCES)
@pytest.mark.parametrize("dtypes", ["fp32", "fp64", "bf16+fp32", "fp16+fp32"])
@pytest.mark.parametrize("rows", [21, 600])
@pytest.mark.parametrize("learns", [True, False])
def test_what_is_seen_at_a_glance_has_the_bits_of_a_closer_look(monkeypatch, options, dtypes, rows, learns):
    inputs = {**plain((3, rows // 3), dtypes=dtypes), **GLANCES[options]}
    names = [name for name in NAMES[:5] if inputs[name] is not None] if learns else []
    dy = dy_for(inputs) if names else None
    of_native = dtypes != "fp64" and layer.is_built()
    seen = (
        of_native
        or ("16" not in dtypes and rows * (41 + 29) <= composite._MOST_LEARNING)
        or (dtypes == "fp64" and not learns)
    )
    looked = []
    closer = functions.run
    monkeypatch.setattr(functions, "run", lambda *args: looked.append(args) or closer(*args))
    torch.manual_seed(3)
    with dispatched() as ran:
        glance = evaluate(routed_lora_linear, inputs, dy, names)
    after = torch.rand(())
    assert bool(looked) != seen
    monkeypatch.setattr(functions, "run_plain", lambda *args: None)
    torch.manual_seed(3)
    with dispatched() as then:
        found = evaluate(routed_lora_linear, inputs, dy, names)
    assert looked and torch.rand(()) == after, "as many draws"
    assert all(torch.equal(glance[name], found[name]) for name in glance) and ran == then


class Ignoring(torch.autograd.Function):
    """Has no gradient for what it was given."""

    @staticmethod
    def forward(ctx, y):
        return y.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


SUBSETS = [names for n in range(1, 6) for names in combinations(NAMES[:5], n)]


@pytest.mark.skipif(not layer.is_built(), reason="the compiled part is not there")
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_compiled_layer_seen_at_a_glance(dtypes, dropout_p, bias):
    """Every subset of gradients, what is saved for it, a graph of the backward, and a second differentiation."""
    inputs = {**plain((600,), dtypes), "dropout_p": dropout_p}
    inputs["bias"] = inputs["bias"] if bias else None
    dy = dy_for(inputs)
    for subset in [names for names in SUBSETS if bias or "bias" not in names]:
        torch.manual_seed(2)
        tensors = {k: v for k, v in inputs.items() if k in NAMES[:5] and v is not None}
        leaves = {**inputs, **{k: v.detach().requires_grad_(k in subset) for k, v in tensors.items()}}
        with saved_tensors() as saved:
            y = routed_lora_linear(**leaves)
        assert "PlainLayer" in type(y.grad_fn).__name__
        assert saved.holds(inputs["x"]) == bool({"weight", "lora_A"} & set(subset)), subset
        assert (600, 29) not in [tuple(t.shape) for t in saved.tensors]
        grads = torch.autograd.grad(y, [leaves[k] for k in subset], dy, retain_graph=True)
        again = torch.autograd.grad(y, [leaves[k] for k in subset], dy, create_graph=True)
        torch.manual_seed(2)
        expected = evaluate(closer_look, inputs, dy, subset)
        for name, grad, graphed in zip(subset, grads, again, strict=True):
            assert torch.equal(grad, expected[name]) and torch.equal(graphed, grad), (subset, name)
            assert grad.dtype == inputs[name].dtype and grad.is_contiguous()
        if len(subset) == len(tensors):
            with pytest.raises(RuntimeError, match="double backward is not supported"):
                again[0].sum().backward()
    (unused,) = torch.autograd.grad(leaves["x"].sum() + Ignoring.apply(y), leaves["x"])
    assert torch.equal(unused, torch.ones_like(unused))


@pytest.mark.parametrize("backend", ["composite", "aten", "reference", *(["native"] if layer.is_built() else [])])
@pytest.mark.parametrize("nothing", [{"scaling": 0.0}, {"dropout_p": 1.0}], ids=str)
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_what_counts_nothing_hides_no_nan(backend, nothing, name):
    inputs = {**plain((21,)), **nothing}
    frozen = torch.nn.functional.linear(inputs["x"], inputs["weight"], inputs["bias"])
    torch.testing.assert_close(routed_lora_linear(**inputs, backend=backend), frozen)
    inputs[name][3, 2] = float("nan")
    y = routed_lora_linear(**inputs, backend=backend)
    assert (y.isnan() if name == "lora_A" else y[:, 3].isnan()).all()


def test_a_bias_of_another_dtype_is_added_as_it_is():
    inputs = plain(dtypes="fp32")
    inputs["bias"] = inputs["bias"].bfloat16()
    for rows in (21, 600):
        x = torch.randn(rows, 41)
        assert_parity(routed_lora_linear, {**inputs, "x": x}, dy=torch.randn(rows, 29))


def closer_look(**inputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "run_plain", lambda *args: None)
        return routed_lora_linear(**inputs)


SIXTEEN = {"x": torch.ones(3, 7, 41).bfloat16(), "weight": torch.ones(29, 41).bfloat16()}


@pytest.mark.parametrize(
    "changed",
    [
        {"scaling": 2},
        {"scaling": 1e39},
        {"scaling": float("nan")},
        {"scaling": torch.tensor(0.5)},
        {"dropout_p": 0},
        {"dropout_p": 0.5, "dropout_seed": torch.tensor(1)},
        {"x": torch.ones(7, 41).to_sparse()},
        {"x": torch.ones(7, 40)},
        {"x": torch.ones(7, 41).bfloat16()},
        {"x": torch.ones(7, 41).int(), "weight": torch.ones(29, 41).int()},
        {**SIXTEEN, "lora_A": torch.ones(41, 5).mT},
        {**SIXTEEN, "lora_B": torch.ones(29, 5).double()},
        {"x": torch.tensor(1.0)},
        {"x": [1.0]},
        {"weight": None},
        {"weight": torch.ones(29, 41).double()},
        {"lora_A": torch.ones(0, 41)},
        {"lora_A": torch.ones(5, 41).double()},
        {"lora_B": torch.ones(29, 5).bfloat16()},
        {"lora_B": torch.ones(29, 4)},
        {"bias": torch.ones(1)},
        {"bias": torch.ones(29).int()},
        {"bias": torch.ones(29, device="meta")},
        {"dropout_p": -0.1},
        {"dropout_p": 1.1},
        {"dropout_p": float("nan")},
        {"dropout_p": "0.1"},
        {"training": 1},
        {"backend": "aten"},
        {"backend": "composite"},
        {"routing": torch.eye(5)},
        {"gate": torch.ones(5)},
    ],
    ids=lambda changed: ", ".join(f"{k}={type(v).__name__}" for k, v in changed.items()),
)
def test_everything_else_gets_a_closer_look(monkeypatch, changed):
    looked, closer = [], functions.run
    monkeypatch.setattr(functions, "run", lambda *args: looked.append(args) or closer(*args))
    inputs = {**plain(), **changed}
    try:
        y = routed_lora_linear(**inputs)
    except (TypeError, ValueError) as error:
        assert str(error).split(":")[0] in (*NAMES, "dropout_p", "training"), error
    else:
        assert looked and y.shape == (3, 7, 29)


def test_in_16_bit_a_glance_leaves_what_the_compiled_call_does_not_do(monkeypatch):
    inputs = {**plain(), **SIXTEEN}
    x = inputs.pop("x")
    with pytest.raises(RuntimeError, match=r"torch\.func\.vmap .* pass backend='reference'"):
        torch.func.vmap(lambda x: routed_lora_linear(x, **inputs))(x)
    with pytest.raises(RuntimeError, match="forward mode"):
        torch.func.jvp(lambda x: routed_lora_linear(x, **inputs), (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode"):
        routed_lora_linear(forward_ad.make_dual(x, x), **inputs)
    monkeypatch.setattr(layer, "LITTLE_WORK", 0)
    with dispatched() as ran:
        routed_lora_linear(x, **inputs)
    assert explain(routed_lora_linear, x, **inputs).backend == "aten" and "routed_lora.aten.linear" in ran


def test_under_autocast_it_is_the_16_bit_layer():
    inputs = plain()
    with torch.autocast("cpu", torch.bfloat16), dispatched() as ran:
        y = routed_lora_linear(**inputs)
    assert y.dtype == torch.bfloat16 and "routed_lora.composite.forward" not in ran


def test_the_layer_takes_it():
    layer, x = RoutedLoRALinear(8, 6, 4, routing=False, dropout_p=0.5), torch.randn(5, 8)
    with dispatched() as ran:
        layer(x), layer.eval()(x)
    assert ran == ["routed_lora.composite.forward"] * 2
