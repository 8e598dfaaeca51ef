"""Every subset of requires_grad: its gradients, what backward computes for it, what is saved. No more than it needs."""

from __future__ import annotations

from functools import partial
from itertools import chain, combinations

import pytest
import torch
from experts import DIFFERENTIABLE, check, dy_for, paths, run
from strategies import DTYPES

from clora_kernels import rank1_experts
from clora_kernels.reference.rank1_experts_samples import make_inputs
from clora_kernels.testing import dispatched, evaluate, saved_tensors

SUBSETS = list(chain.from_iterable(combinations(DIFFERENTIABLE, n) for n in range(1, len(DIFFERENTIABLE) + 1)))


@pytest.mark.parametrize("path", [*paths(), "reference"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
def test_every_subset_gets_the_gradients_of_the_full_set(device, monkeypatch, dtypes, per_sample, path):
    dtype, experts_dtype = DTYPES[dtypes]
    options = {"scaling": None, "base_output": dtype, "per_sample": per_sample}
    inputs = make_inputs((4, 2), 33, 35, 9, 3, dtype=dtype, experts_dtype=experts_dtype, device=device, **options)
    fn = partial(rank1_experts, backend="reference") if path == "reference" else run(path, monkeypatch)
    dy = dy_for(inputs)
    full = evaluate(fn, inputs, dy, DIFFERENTIABLE)
    assert all(full[name].abs().max() > 0 for name in DIFFERENTIABLE)
    check(full, inputs, dy)
    for subset in SUBSETS:
        some = evaluate(fn, inputs, dy, subset)
        assert all(torch.equal(some[name], full[name]) for name in ("y", *subset)), subset


PRIMITIVES = {
    ("base_output",): [],
    ("scaling",): ["shrink"],
    ("gates",): ["shrink"],
    ("x",): ["shrink", "expand"],
    ("experts_A",): ["order", "shrink", "reduce"],
    ("experts_B",): ["order", "reduce"],
    ("experts_A", "experts_B"): ["order", "shrink", "reduce", "reduce"],
    ("x", "experts_A", "experts_B", "gates"): ["order", "shrink", "expand", "reduce", "reduce"],
}


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("subset", PRIMITIVES, ids="+".join)
def test_backward_computes_no_more_than_is_wanted(device, monkeypatch, path, subset):
    inputs = make_inputs(scaling=None, base_output=torch.float32, device=device)
    for name in subset:
        inputs[name].requires_grad_()
    y = run(path, monkeypatch)(**inputs)
    with dispatched() as calls:
        y.backward(dy_for(inputs))
    assert calls == [f"rank1_experts.{path}.{primitive}" for primitive in PRIMITIVES[subset]]
    assert all((inputs[name].grad is not None) == (name in subset) for name in DIFFERENTIABLE)


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_saved_is_the_least_that_backward_reads(device, subset, gates):
    """Both pools and what chooses, x only for experts_A, p only for what reads it, never a chosen row."""
    inputs = make_inputs((50,), 31, 43, 6, 2, scaling=None, base_output=torch.float32, gates=gates, device=device)
    subset = [name for name in subset if name in inputs]
    for name in subset:
        inputs[name].requires_grad_()
    with saved_tensors() as saved:
        rank1_experts(**inputs)
    assert saved.holds(inputs["x"]) == ("experts_A" in subset)
    kept = [t for t in saved.tensors if t.is_floating_point() and tuple(t.shape) == (50, 2)]
    reads_p = bool({"experts_B", "gates", "scaling"} & set(subset))
    assert len(kept) == reads_p + (gates and bool(subset))
    assert max(saved.numel, default=0) <= 50 * 31, "x at most: no y, no base output, no chosen rows"


def test_without_any_gradient_there_is_no_graph(device):
    inputs = make_inputs(device=device)
    with saved_tensors() as saved:
        y = rank1_experts(**inputs)
        with torch.no_grad():
            inputs["experts_A"].requires_grad_()
            rank1_experts(**inputs)
    assert y.grad_fn is None and saved.tensors == []


def test_gradients_have_the_dtype_and_shape_of_their_inputs(device):
    options = {"scaling": None, "base_output": torch.float32, "device": device}
    inputs = make_inputs(dtype=torch.bfloat16, experts_dtype=torch.float16, **options)
    grads = evaluate(rank1_experts, inputs, dy_for(inputs), DIFFERENTIABLE)
    for name in DIFFERENTIABLE:
        assert (grads[name].dtype, grads[name].shape) == (inputs[name].dtype, inputs[name].shape), name


@pytest.mark.parametrize("layout", ["transposed", "padded", "expanded"])
def test_y_and_gradients_come_contiguous(device, layout):
    from strategies import laid_out

    inputs = make_inputs(scaling=None, device=device)
    inputs = {k: laid_out(v, layout) if v.is_floating_point() else v for k, v in inputs.items()}
    results = evaluate(rank1_experts, inputs, dy_for(inputs, layout), ["x", "experts_A", "experts_B", "gates"])
    assert all(t.is_contiguous() for t in results.values())


def test_gradient_of_a_sum_has_stride_0(device):
    inputs = make_inputs(device=device)
    x, A = inputs["x"].requires_grad_(), inputs["experts_A"].requires_grad_()
    through_sum = torch.autograd.grad(rank1_experts(**inputs).sum(), [x, A])
    y = rank1_experts(**inputs)
    through_ones = torch.autograd.grad(y, [x, A], torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(through_sum, through_ones, strict=True))


def test_one_pool_as_both_sides(device):
    """Tied experts get the sum of both gradients."""
    inputs = make_inputs(K=29, N=29, device=device)
    A, B = (inputs["experts_A"].clone().requires_grad_() for _ in range(2))
    dA, dB = torch.autograd.grad(rank1_experts(**{**inputs, "experts_A": A, "experts_B": B}).sum(), [A, B])
    (of_tied,) = torch.autograd.grad(rank1_experts(**{**inputs, "experts_A": A, "experts_B": A}).sum(), A)
    assert torch.equal(of_tied, dA + dB)
