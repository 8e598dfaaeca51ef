"""Strides, pointers and order: tensors laid out oddly, backward repeated, the same bits each time."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from hypothesis import given
from strategies import DIFFERENTIABLE, DTYPES, LAYOUTS, call, calls, dy_for, laid_out, tensors_of

from clora_kernels import routed_lora_linear
from clora_kernels.reference.routed_lora_samples import make_inputs
from clora_kernels.testing import assert_parity, evaluate, guarded, unchanged

TENSORS = ("x", "weight", "lora_A", "lora_B", "routing", "frozen_routing", "bias", "gate")
OPTIONS = {"frozen": True, "gate": (3, 7, 5), "scaling": None, "dropout_p": 0.2}


@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*TENSORS, "dy", "all"])
def test_each_tensor_in_each_layout(device, name, layout, dtypes):
    dtype, adapter_dtype = DTYPES[dtypes]
    inputs = make_inputs(**OPTIONS, dtype=dtype, adapter_dtype=adapter_dtype, device=device)
    for key in TENSORS if name == "all" else [name]:
        if key != "dy":
            inputs[key] = laid_out(inputs[key], layout)
    dy = dy_for(inputs, layout if name in ("dy", "all") else "contiguous")
    with unchanged(dy, *tensors_of(inputs)):
        assert_parity(call, inputs, dy=dy)


@pytest.mark.parametrize("options", [{"bank": 2}, {"weight": False, "base_output": torch.float32}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bank_and_base_output_in_each_layout(device, layout, options):
    inputs = make_inputs(**options, dtype=torch.bfloat16, adapter_dtype=torch.float32, device=device)
    for name in ("x", "routing", "base_output"):
        if name in inputs:
            inputs[name] = laid_out(inputs[name], layout)
    if "routing_index" in inputs:
        inputs["routing_index"] = torch.stack([inputs["routing_index"]] * 2, -1)[:, 0]
    assert_parity(call, inputs, dy=dy_for(inputs, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_gradients_and_output(device, layout):
    """y and every gradient come contiguous, whatever came in."""
    inputs = {k: laid_out(v, layout) if k in TENSORS else v for k, v in make_inputs(device=device).items()}
    results = evaluate(routed_lora_linear, inputs, dy_for(inputs, layout), ["x", "weight", "lora_A", "lora_B"])
    assert all(t.is_contiguous() for t in results.values())


def test_gradient_of_a_sum_has_stride_0(device):
    inputs = make_inputs(**OPTIONS, device=device)
    x = inputs["x"].requires_grad_()
    (through_sum,) = torch.autograd.grad(routed_lora_linear(**inputs).sum(), x)
    y = routed_lora_linear(**inputs)
    (through_ones,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(through_sum, through_ones)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16+fp32", "fp16"])
@pytest.mark.parametrize("offset", [1, 3])
def test_base_pointers_aligned_to_one_element(device, dtypes, offset):
    """Every tensor starts in the middle of a vector, between margins that stay as they are."""
    dtype, adapter_dtype = DTYPES[dtypes]
    inputs = make_inputs(**OPTIONS, dtype=dtype, adapter_dtype=adapter_dtype, device=device)
    with ExitStack() as stack:
        moved = {k: stack.enter_context(guarded(v, offset)) if k in TENSORS else v for k, v in inputs.items()}
        dy = stack.enter_context(guarded(dy_for(inputs), offset))
        assert moved["x"].data_ptr() % 16 == offset * dtype.itemsize % 16
        assert_parity(partial(call, backend="aten"), moved, dy=dy)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32", "fp16", "fp64"])
@pytest.mark.parametrize("options", [OPTIONS, {"bank": 2, "gate": (5,), "dropout_p": 0.5, "scaling": None}])
def test_bitwise_repeatable(device, all_threads, dtypes, options, mask_path):
    """Two calls, and two backwards of one call, give the same bits; accumulating doubles exactly."""
    dtype, adapter_dtype = DTYPES[dtypes]
    sizes = {"lead": (3, 7), "K": 300, "N": 500}
    inputs = make_inputs(**sizes, **options, dtype=dtype, adapter_dtype=adapter_dtype, device=device)
    dy, names = dy_for(inputs), [name for name in DIFFERENTIABLE if isinstance(inputs.get(name), torch.Tensor)]
    first, second = (evaluate(routed_lora_linear, inputs, dy, names) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    for name in names:
        inputs[name].requires_grad_()
    y = routed_lora_linear(**inputs)
    y.backward(dy, retain_graph=True)
    once = {name: inputs[name].grad.clone() for name in names}
    y.backward(dy)
    for name in names:
        assert torch.equal(inputs[name].grad, 2 * once[name]) and torch.equal(once[name], first[name]), name
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


def test_one_tensor_as_two_arguments(device):
    """A tied lora_A and lora_B, and one x used twice, get the sum of both gradients."""
    inputs = make_inputs((4,), 29, 29, 5, weight=False, device=device)
    tied = inputs["lora_A"].clone().requires_grad_()
    x = inputs["x"].requires_grad_()
    y = call(**{**inputs, "lora_A": tied, "lora_B": tied.mT})
    (of_tied,) = torch.autograd.grad(y.sum(), tied)
    A, B = inputs["lora_A"].clone().requires_grad_(), inputs["lora_A"].mT.clone().requires_grad_()
    dx, dA, dB = torch.autograd.grad(call(**{**inputs, "lora_A": A, "lora_B": B}).sum(), [x, A, B])
    assert torch.equal(of_tied, dA + dB.mT)
    ys = [call(**{**inputs, "lora_A": A, "lora_B": B}) for _ in range(2)]
    (of_x,) = torch.autograd.grad(sum(ys).sum(), x)
    assert torch.equal(of_x, 2 * dx)


@given(calls())
def test_any_call(drawn):
    """Random shapes, options, dtypes and strides, M = 0 included."""
    inputs, dy = drawn
    with unchanged(dy, *tensors_of(inputs)):
        assert_parity(partial(call, backend="aten"), inputs, dy=dy)


def test_a_strided_bias(device):
    """Large enough for every library that a CPU has."""
    inputs = make_inputs((256,), 256, 256, 4, device=device)
    inputs["bias"] = torch.randn(512, device=device)[::2]
    assert_parity(routed_lora_linear, inputs)
