"""Routed LoRA against fp64: y and every gradient, in every dtype, option and size; adapter fidelity."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from strategies import DTYPES, call, dy_for, tensors_of

from clora_kernels import RoutedLoRA, routed_lora_delta, routed_lora_linear, routed_lora_linear_group
from clora_kernels.reference.routed_lora_samples import make_inputs, sample_inputs
from clora_kernels.testing import (
    assert_fidelity,
    assert_parity,
    dispatched,
    guarded_outputs,
    poisoned_empty,
    saved_tensors,
    unchanged,
)

SAMPLES = [name for name, _ in sample_inputs()]


def sample(name, dtypes, device):
    return dict(sample_inputs(*DTYPES[dtypes], device=device))[name]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", SAMPLES)
def test_samples(device, mask_path, name, dtypes):
    """Every option; inputs and saved tensors unchanged, no unwritten memory read, the named backend at work."""
    inputs = sample(name, dtypes, device)
    dy = dy_for(inputs)
    with unchanged(dy, *tensors_of(inputs)), poisoned_empty(), saved_tensors(), dispatched() as calls:
        result = assert_parity(partial(call, backend="aten"), inputs, dy=dy)
    assert set(result) >= {"y", "x", "lora_A", "lora_B"}
    assert calls[:3] == [f"routed_lora.aten.{primitive}" for primitive in ("pack", "shrink", "linear")]
    backward = {f"routed_lora.aten.{primitive}" for primitive in ("pack", "shrink", "linear", "reduce")}
    assert set(calls[3:]) - {"routed_lora.aten.unpack"} == backward
    assert ("routed_lora.aten.unpack" in calls) == (inputs.get("routing_index") is None)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32", "fp64"])
@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_is_written_beyond_an_output(device, name, dtypes):
    inputs = sample(name, dtypes, device)
    with guarded_outputs():
        assert_parity(partial(call, backend="aten"), inputs, dy=dy_for(inputs))


@pytest.mark.parametrize("dtypes", ["fp32", "fp64", "fp32+bf16"])
@pytest.mark.parametrize("name", SAMPLES)
def test_reference_by_autograd_agrees_with_its_backward_by_hand(device, name, dtypes):
    inputs = sample(name, dtypes, device)
    with dispatched() as calls:
        assert_parity(partial(call, backend="reference"), inputs, dy=dy_for(inputs))
    assert calls == []


SIZES = [
    ((1,), 2049, 517, 12),
    ((7,), 517, 2049, 4),
    ((1000,), 259, 2049, 24),
    ((3, 333), 2051, 131, 96),
    ((1001,), 67, 35, 256),
    ((2, 5), 2049, 2051, 1),
    ((4097,), 33, 41, 3),
]


@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32", "fp16"])
@pytest.mark.parametrize("lead, K, N, r", SIZES)
def test_sizes(device, mask_path, all_threads, lead, K, N, r, dtypes):
    dtype, adapter_dtype = DTYPES[dtypes]
    options = {"frozen": True, "gate": (r,), "scaling": None, "dropout_p": 0.2, "device": device}
    inputs = make_inputs(lead, K, N, r, dtype=dtype, adapter_dtype=adapter_dtype, **options)
    assert_parity(call, inputs, dy=dy_for(inputs))


@pytest.mark.parametrize("r", [1, 2, 15, 16, 17, 64, 65, 255, 256])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
def test_ranks(device, r, dtypes):
    dtype, adapter_dtype = DTYPES[dtypes]
    inputs = make_inputs((3, 11), 93, 75, r, dtype=dtype, adapter_dtype=adapter_dtype, gate=(3, 1, r), device=device)
    assert_parity(call, inputs, dy=dy_for(inputs))


FIDELITY = {
    "plain": {"routing": False},
    "routed": {"frozen": True, "gate": (4, 1, 7)},
    "bank": {"bank": 3},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("strength", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("dtypes", ["bf16", "bf16+fp32", "fp16+fp32", "fp32"])
@pytest.mark.parametrize("options", FIDELITY)
def test_adapter_comes_through_whole(device, options, dtypes, strength):
    """An adapter of 1e-3 of y, which a sum rounded twice halves, and one as large as x·W; also alone, with W = 0."""
    dtype, adapter_dtype = DTYPES[dtypes]
    sizes = {"lead": (4, 100), "K": 193, "N": 271, "r": 7}
    inputs = make_inputs(
        **sizes, **FIDELITY[options], dtype=dtype, adapter_dtype=adapter_dtype, strength=strength, device=device
    )
    assert_fidelity(call(**inputs), **inputs)
    inputs = {**inputs, "weight": torch.zeros_like(inputs["weight"]), "bias": None}
    y = call(**inputs)
    assert_fidelity(y, **inputs)
    assert_parity({"y": y}, inputs)


@pytest.mark.parametrize("strength", [1e-3, 1.0])
@pytest.mark.parametrize("dtypes", ["bf16+fp32", "fp16", "fp32"])
def test_adapter_comes_through_whole_in_dx(device, dtypes, strength):
    """dx is a layer too: of dy, with weightᵀ below and an adapter of C and lora_A."""
    dtype, adapter_dtype = DTYPES[dtypes]
    inputs = make_inputs(
        (4, 100), 271, 193, 7, dtype=dtype, adapter_dtype=adapter_dtype, strength=strength, gate=(7,), device=device
    )
    x, dy = inputs["x"].requires_grad_(), dy_for(inputs)
    (dx,) = torch.autograd.grad(call(**inputs), x, dy)
    C = inputs["scaling"] * inputs["routing"].double() @ inputs["lora_B"].double().mT
    assert_fidelity(dx, dy, inputs["weight"].mT, C, inputs["lora_A"].mT, gate=inputs["gate"])


@pytest.mark.parametrize("dtypes", ["bf16+fp32", "fp16+fp32"])
@pytest.mark.parametrize("options", FIDELITY)
def test_adapter_comes_through_whole_at_even_sizes(device, options, dtypes):
    """Where sizes are multiples of 8 libraries have other kernels, which round otherwise: y and dx, of a layer and, dx
    in one sum, of two."""
    dtype, adapter_dtype = DTYPES[dtypes]
    types = {"dtype": dtype, "adapter_dtype": adapter_dtype, "strength": 1e-3, "device": device}
    inputs = make_inputs((4, 128), 512, 256, 7, **FIDELITY[options], **types)
    assert_fidelity(call(**inputs), **inputs)
    inputs = make_inputs((4, 128), 256, 512, 7, routing=False, bias=None, **types)
    dy, arguments = dy_for(inputs), {k: v for k, v in inputs.items() if k != "x"}
    of_dx = (inputs["weight"].mT, inputs["scaling"] * inputs["lora_B"].mT, inputs["lora_A"].mT)
    for copies in (1, 2):
        x = inputs["x"].clone().requires_grad_()
        ys = routed_lora_linear_group(x, [RoutedLoRA(**arguments)] * copies)
        (dx,) = torch.autograd.grad(ys, x, [dy / copies] * copies)
        assert_fidelity(dx, dy, *of_dx)


@pytest.mark.parametrize("dtypes", ["bf16+fp32", "fp16+fp32", "fp32"])
def test_adapter_comes_through_whole_onto_an_fp32_base(device, dtypes):
    dtype, adapter_dtype = DTYPES[dtypes]
    options = {"strength": 1e-3, "weight": False, "base_output": torch.float32, "device": device}
    inputs = make_inputs((4, 100), 193, 271, 7, dtype=dtype, adapter_dtype=adapter_dtype, **options)
    y = call(**inputs)
    assert y.dtype == torch.float32
    assert_fidelity(y, **inputs)


def test_delta_alone_has_the_dtype_of_x(device):
    inputs = make_inputs((4, 9), dtype=torch.bfloat16, adapter_dtype=torch.float32, weight=False, device=device)
    assert routed_lora_delta(**{k: v for k, v in inputs.items() if k != "weight"}).dtype == torch.bfloat16


def test_scaling_as_a_number_or_a_tensor_is_one(device):
    inputs = make_inputs(device=device)
    numbers = [1.5, torch.tensor(1.5, device=device), torch.tensor(1.5, dtype=torch.float64)]
    ys = [routed_lora_linear(**{**inputs, "scaling": s}) for s in numbers]
    assert torch.equal(ys[0], ys[1]) and torch.equal(ys[0], ys[2])
    assert torch.equal(routed_lora_linear(**{**inputs, "scaling": 2}), routed_lora_linear(**{**inputs, "scaling": 2.0}))
