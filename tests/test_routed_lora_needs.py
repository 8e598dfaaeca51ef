"""Every subset of requires_grad: its gradients, what it computes and what it saves. No more than it needs."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from strategies import DTYPES, call, dy_for

from clora_kernels import RoutedLoRA, routed_lora_linear, routed_lora_linear_group
from clora_kernels.reference.routed_lora_samples import make_inputs
from clora_kernels.testing import assert_parity, dispatched, evaluate, saved_tensors

NAMES = ("x", "weight", "lora_A", "lora_B", "routing", "gate", "bias", "scaling")
SUBSETS = list(chain.from_iterable(combinations(NAMES, n) for n in range(1, len(NAMES) + 1)))
OPTIONS = {
    "plain": {"gate": (3,)},
    "frozen": {"frozen": True, "gate": (4, 1, 3), "dropout_p": 0.3},
    "bank": {"bank": 2, "frozen": True, "gate": (3,)},
}


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
def test_every_subset_gets_the_gradients_of_the_full_set(device, dtypes, options, backend):
    dtype, adapter_dtype = DTYPES[dtypes]
    sizes = {"lead": (4, 2), "K": 5, "N": 6, "r": 3, "scaling": None}
    inputs = make_inputs(**sizes, **OPTIONS[options], dtype=dtype, adapter_dtype=adapter_dtype, device=device)
    dy = dy_for(inputs)

    def fn(**kwargs):
        return call(**kwargs, backend=backend)

    full = evaluate(fn, inputs, dy, NAMES)
    assert all(full[name].abs().max() > 0 for name in NAMES)
    assert_parity(full, inputs, dy=dy)
    for subset in SUBSETS:
        some = evaluate(fn, inputs, dy, subset)
        if options == "plain" or backend == "reference":
            assert all(torch.equal(some[name], full[name]) for name in ("y", *subset)), subset
        else:  # with two paths a product may be one of two stacked ones, whose sums have another order
            assert_parity(some, inputs, dy=dy, gradients=subset)


def test_without_any_gradient_there_is_no_graph(device):
    inputs = make_inputs(device=device)
    with saved_tensors() as saved:
        y = routed_lora_linear(**inputs)
        with torch.no_grad():
            inputs["lora_A"].requires_grad_()
            routed_lora_linear(**inputs)
    assert y.grad_fn is None and saved.tensors == []


PRIMITIVES = {
    ("bias",): [],
    ("routing",): ["reduce", "unpack"],
    ("lora_B",): ["reduce", "unpack"],
    ("scaling",): ["reduce", "unpack"],
    ("gate",): ["pack", "shrink"],
    ("lora_A",): ["pack", "shrink", "reduce"],
    ("weight",): [],
    ("x",): ["pack", "shrink", "linear"],
    ("lora_A", "lora_B"): ["pack", "shrink", "reduce", "unpack", "reduce"],
    ("x", "lora_A", "lora_B"): ["pack", "shrink", "reduce", "unpack", "linear", "reduce"],
}


@pytest.mark.parametrize("subset", PRIMITIVES, ids="+".join)
@pytest.mark.parametrize("frozen", [False, True])
def test_backward_computes_no_more_than_is_wanted(device, subset, frozen):
    inputs = make_inputs(gate=(5,), scaling=None, frozen=frozen, device=device)
    for name in subset:
        inputs[name].requires_grad_()
    y = routed_lora_linear(**inputs, backend="aten")
    with dispatched() as calls:
        y.backward(dy_for(inputs))
    assert calls == [f"routed_lora.aten.{primitive}" for primitive in PRIMITIVES[subset]]
    assert all((inputs[name].grad is not None) == (name in subset) for name in NAMES)


SIZES = {"lead": (50,), "K": 31, "N": 43, "r": 2}  # M·K = 1550 and M·N = 2150 are far above every other size


@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32", "fp16"])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_saved_is_the_least_that_backward_reads(device, subset, dtypes):
    dtype, adapter_dtype = DTYPES[dtypes]
    options = {"frozen": True, "dropout_p": 0.2, "scaling": None, "gate": (2,)}
    inputs = make_inputs(**SIZES, **options, dtype=dtype, adapter_dtype=adapter_dtype, device=device)
    for name in subset:
        inputs[name].requires_grad_()
    with saved_tensors() as saved:
        routed_lora_linear(**inputs)
    needs_x = bool({"weight", "lora_A"} & set(subset))
    needs_p = bool({"lora_B", "routing", "gate", "scaling"} & set(subset))
    large = [t for t in saved.tensors if t.numel() > 43 * 31]
    assert saved.holds(inputs["x"]) == needs_x
    assert len(large) == needs_x and all(t.shape == (50, 31) for t in large), "x once, no y, no mask, no copy"
    assert sum(tuple(t.shape) == (50, 2) for t in saved.tensors) == needs_p


def test_a_group_saves_x_once(device):
    inputs = make_inputs(**SIZES, device=device)
    layers = []
    for seed in range(3):
        _, *rest = make_inputs(**SIZES, device=device, seed=seed).items()
        layers.append(RoutedLoRA(**dict(rest)))
        layers[-1].lora_A.requires_grad_()
        layers[-1].lora_B.requires_grad_()
    with saved_tensors() as saved:
        routed_lora_linear_group(inputs["x"], layers)
    assert [tuple(t.shape) for t in saved.tensors if t.numel() > 43 * 31] == [(50, 31)] and saved.holds(inputs["x"])


def test_gradients_have_the_dtype_and_shape_of_their_inputs(device):
    inputs = make_inputs(dtype=torch.bfloat16, adapter_dtype=torch.float32, gate=(3, 1, 5), scaling=None, device=device)
    grads = evaluate(routed_lora_linear, inputs, dy_for(inputs), NAMES)
    for name in NAMES:
        assert (grads[name].dtype, grads[name].shape) == (inputs[name].dtype, inputs[name].shape), name
