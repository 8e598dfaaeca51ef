"""backend="native", the compiled path of a plain layer: parity, fidelity, gradients, layouts, memory."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import NAMES, RAN, TYPES, built, native, plain
from strategies import LAYOUTS, dy_for, laid_out, tensors_of

from clora_kernels.testing import (
    assert_fidelity,
    assert_parity,
    dispatched,
    evaluate,
    guarded_outputs,
    poisoned_empty,
    saved_tensors,
    unchanged,
)

SIZES = [
    ((0,), 41, 29, 5),
    ((1,), 517, 259, 12),
    ((2,), 131, 517, 4),
    ((7,), 67, 35, 17),
    ((8,), 1030, 33, 8),
    ((1000,), 259, 131, 3),
    ((2, 3, 1, 5), 9, 1, 1),
    ((), 1, 9, 2),
    ((0, 3), 8, 8, 96),
]


@built
@pytest.mark.parametrize("dtypes", TYPES)
@pytest.mark.parametrize("options", [{"bias": False}, {"dropout_p": 0.3, "scaling": None}, {"dropout_p": 1.0}], ids=str)
@pytest.mark.parametrize("lead, K, N, r", SIZES)
def test_parity(lead, K, N, r, options, dtypes):
    inputs = plain(lead, dtypes, K=K, N=N, r=r, **options)
    dy = dy_for(inputs)
    with unchanged(dy, *tensors_of(inputs)), poisoned_empty(), saved_tensors(), dispatched() as ran:
        assert_parity(native, inputs, dy=dy)
    assert ran == RAN


@built
@pytest.mark.parametrize("dtypes", TYPES)
@pytest.mark.parametrize("M", range(1, 10))
def test_each_few_rows(M, dtypes):
    """Their frozen product is a kernel of its own, forward or backward, up to some number of rows of each dtype."""
    inputs = plain((M,), dtypes, K=131, N=67, dropout_p=0.2)
    assert_parity(native, inputs, dy=dy_for(inputs))


@built
@pytest.mark.parametrize("strength", [1e-3, 1.0])
@pytest.mark.parametrize("dtypes", TYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_adapter_comes_through_whole(dropout_p, dtypes, strength):
    options = {"K": 193, "N": 271, "r": 7, "dropout_p": dropout_p, "strength": strength}
    inputs = plain((4, 100), dtypes, **options)
    assert_fidelity(native(**inputs), **inputs)
    alone = {**inputs, "weight": torch.zeros_like(inputs["weight"]), "bias": None}
    assert_fidelity(native(**alone), **alone)
    if not dropout_p:  # dx is a layer of dy, with weightᵀ below and an adapter of C and lora_A
        x, dy = inputs["x"].requires_grad_(), dy_for(inputs)
        (dx,) = torch.autograd.grad(native(**inputs), x, dy)
        C = inputs["scaling"] * inputs["lora_B"].double().mT
        assert_fidelity(dx, dy, inputs["weight"].mT, C, inputs["lora_A"].mT)


@built
@pytest.mark.parametrize("dtypes", TYPES)
def test_adapter_of_few_rows_comes_through_whole(dtypes):
    """The few rows of the frozen product are added to what is rounded already: many columns show what that costs."""
    for M in (1, 2, 4, 8):
        inputs = plain((M,), dtypes, K=193, N=20000, r=7, bias=False, strength=0.03)
        assert_fidelity(native(**inputs), **inputs)
        inputs = plain((M,), dtypes, K=20000, N=193, r=7, bias=False, strength=0.03)
        x, dy = inputs["x"].requires_grad_(), dy_for(inputs)
        (dx,) = torch.autograd.grad(native(**inputs), x, dy)
        C = inputs["scaling"] * inputs["lora_B"].double().mT
        assert_fidelity(dx, dy, inputs["weight"].mT, C, inputs["lora_A"].mT)


SUBSETS = list(chain.from_iterable(combinations(NAMES, n) for n in range(len(NAMES) + 1)))


@built
@pytest.mark.parametrize("dtypes", TYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("M", [3, 12])
def test_every_subset_gets_the_bits_of_the_full_set(M, dropout_p, dtypes):
    inputs = plain((M,), dtypes, K=37, N=21, scaling=None, dropout_p=dropout_p)
    dy = dy_for(inputs)
    full = evaluate(native, inputs, dy, NAMES)
    assert_parity(full, inputs, dy=dy)
    assert all(full[name].abs().max() > 0 and full[name].is_contiguous() for name in NAMES)
    assert all((full[name].dtype, full[name].shape) == (inputs[name].dtype, inputs[name].shape) for name in NAMES)
    for subset in SUBSETS[1:]:
        some = evaluate(native, inputs, dy, subset)
        assert all(torch.equal(some[name], full[name]) for name in ("y", *subset)), subset
    assert torch.equal(native(**inputs), full["y"]), "without gradients"


@built
def test_backward_computes_no_more_than_is_wanted():
    inputs = plain(scaling=None)
    for subset in SUBSETS[1:]:
        for name in NAMES:
            inputs[name].requires_grad_(name in subset).grad = None
        with saved_tensors() as saved:
            y = native(**inputs)
        assert saved.holds(inputs["x"]) == bool({"weight", "lora_A"} & set(subset)), subset
        y.backward(dy_for(inputs))
        assert all((inputs[name].grad is not None) == (name in subset) for name in NAMES), subset


@built
@pytest.mark.parametrize("dtypes", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "dy"])
@pytest.mark.parametrize("M", [2, 11])
def test_layouts(M, name, layout, dtypes):
    """A transposed weight is that of a Conv1D, an expanded dy that of a sum."""
    inputs = plain((M,), dtypes, K=37, N=21, dropout_p=0.2)
    if name != "dy":
        inputs[name] = laid_out(inputs[name], layout)
    dy = dy_for(inputs, layout if name == "dy" else "contiguous")
    with unchanged(dy, *tensors_of(inputs)):
        assert_parity(native, inputs, dy=dy)


@built
@settings(max_examples=100)
@given(data=st.data(), dtypes=st.sampled_from(TYPES), M=st.integers(0, 40), r=st.sampled_from([1, 3, 8, 17, 40]))
def test_any_plain_layer(data, dtypes, M, r):
    K, N = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    # where a bias is added to few rounded numbers it may cancel them and leave the first rounding
    bias = (dtypes == "fp32" or M * N >= 32) and data.draw(st.booleans())
    p = data.draw(st.sampled_from([0.0, 0.25, 1.0]))
    seed = data.draw(st.integers(0, 2**20))
    inputs = plain((M,), dtypes, K=K, N=N, r=r, bias=bias, dropout_p=p, seed=seed)
    layouts = [x for x in LAYOUTS if x != "expanded"]
    for name in ("x", "weight"):
        inputs[name] = laid_out(inputs[name], data.draw(st.sampled_from(layouts)))
    dy = dy_for(inputs, data.draw(st.sampled_from(layouts)), seed)
    with unchanged(dy, *tensors_of(inputs)), poisoned_empty():
        assert_parity(native, inputs, dy=dy)


@built
@pytest.mark.parametrize("dtypes", TYPES)
@pytest.mark.parametrize("M", [1, 4, 9])
def test_outputs_are_guarded_and_every_call_gives_the_same_bits(all_threads, M, dtypes):
    inputs = plain((M, 3), dtypes, K=300, N=500, dropout_p=0.3, scaling=None)
    dy = dy_for(inputs)
    first = evaluate(native, inputs, dy, NAMES)
    with guarded_outputs():
        assert_parity(native, inputs, dy=dy)
    second = evaluate(native, inputs, dy, NAMES)
    assert all(torch.equal(first[k], second[k]) for k in first)
    for name in NAMES:
        inputs[name].requires_grad_()
    y = native(**inputs)
    y.backward(dy, retain_graph=True)
    y.backward(dy)
    assert all(torch.equal(inputs[name].grad, 2 * first[name]) for name in NAMES)
