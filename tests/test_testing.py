"""The proof machinery is itself proved: every rule passes what is right and fails what was broken on purpose."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from strategies import DTYPES, call, dy_for

from clora_kernels import routed_lora_linear
from clora_kernels.reference import routed_lora as reference
from clora_kernels.reference.routed_lora_samples import make_inputs
from clora_kernels.testing import (
    Deviation,
    adapter_fidelity,
    adapter_term,
    assert_fidelity,
    assert_parity,
    compare,
    evaluate,
)


def options(device, dtypes="bf16+fp32", **kwargs):
    dtype, adapter_dtype = DTYPES[dtypes]
    defaults = {"lead": (5, 31), "K": 130, "N": 75, "r": 6, "frozen": True, "gate": (5, 1, 6), "scaling": None}
    return make_inputs(**{**defaults, **kwargs}, dtype=dtype, adapter_dtype=adapter_dtype, device=device)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_parity_passes_the_reference(device, dtypes):
    inputs = options(device, dtypes)
    result = assert_parity(reference.forward, inputs, dy=dy_for(inputs))
    expected = {"y", "x", "weight", "lora_A", "lora_B", "routing", "bias", "gate", "scaling"}
    assert set(result) == expected and all(isinstance(d, Deviation) and d.ok for d in result.values())


def without(*names):
    def forward(**inputs):
        return reference.forward(**{k: v for k, v in inputs.items() if k not in names})

    return forward


def scaled(y_factor=1.0, **factors):
    def forward(**inputs):
        return y_factor * reference.forward(**{k: v * factors.get(k, 1) for k, v in inputs.items()})

    return forward


def with_element(y, change):
    place = y.float().abs().flatten().argmax()
    return y.flatten().index_copy(0, place[None], change(y).flatten()[place[None]]).view(y.shape)


FAULTS = {
    "bias dropped": without("bias"),
    "gate dropped": without("gate"),
    "frozen routing dropped": without("frozen_routing"),
    "routing dropped": without("routing", "frozen_routing"),
    "routing transposed": lambda **i: reference.forward(**{**i, "routing": i["routing"].mT}),
    "scaling skipped": without("scaling"),
    "adapter scaled 1.02": scaled(scaling=1.02),
    "output scaled 1.02": scaled(1.02),
    "one element wrong": lambda **i: with_element(reference.forward(**i), lambda y: y + y.abs().max() / 16),
    "one element lost": lambda **i: with_element(reference.forward(**i), torch.zeros_like),
    "one element NaN": lambda **i: with_element(reference.forward(**i), lambda y: y * torch.nan),
    "one column lost": lambda **i: reference.forward(**i).index_fill(2, torch.tensor(7, device=i["x"].device), 0),
    "wrong dtype": lambda **i: reference.forward(**i).float(),
    "wrong shape": lambda **i: reference.forward(**i)[..., :-1],
    "nothing": lambda **i: None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_fails_a_broken_forward(device, fault):
    with pytest.raises(AssertionError, match="y: "):
        assert_parity(FAULTS[fault], options(device))


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "routing", "bias", "gate", "scaling"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32", "fp64"])
def test_parity_fails_each_broken_gradient_by_name(device, dtypes, name):
    inputs = options(device, dtypes)
    results = evaluate(reference.forward, inputs, dy_for(inputs), ["x", "weight", "lora_A", "lora_B", "gate"])
    good = {**results, **evaluate(reference.forward, inputs, dy_for(inputs), ["routing", "bias", "scaling"])}
    assert_parity(good, inputs, dy=dy_for(inputs))
    for bad in (good[name] * 1.1, torch.zeros_like(good[name]), None, good[name] * torch.inf):
        with pytest.raises(AssertionError, match=f"{name}: ") as error:
            assert_parity({**good, name: bad}, inputs, dy=dy_for(inputs))
        assert str(error.value).count("\n") == 1, "only the broken gradient is named"


def test_parity_sees_tf32_in_fp32(device):
    """Operands cut to ten bits of mantissa, as tensor cores take them, are no fp32."""

    def cut(t):
        return (t.view(torch.int32) & ~0x1FFF).view(torch.float32) if t.dtype == torch.float32 else t

    inputs = options(device, "fp32", gate=None)
    with pytest.raises(AssertionError, match="y: "):
        assert_parity(lambda **i: reference.forward(**{k: cut(v) for k, v in i.items()}), inputs)


def test_parity_of_one_number_needs_no_luck():
    """A result of one number is held to the same bound by both norms, even where the reference has no error."""
    truth, magnitude = torch.tensor([3.0]).double(), torch.tensor([1000.0]).double()
    off = truth.float() + 2.0**-12
    deviation = compare(off, truth, truth.float(), magnitude, torch.float32)
    assert deviation.ok and deviation.frobenius_bound == deviation.maximum_bound
    assert not compare(off, truth, truth.float(), magnitude / 1000, torch.float32).ok


def test_parity_holds_fp64_to_fp64():
    truth = torch.linspace(1, 2, 101, dtype=torch.float64)
    assert compare(truth * (1 + 2**-52), truth, truth, truth, torch.float64).ok
    assert not compare(truth * (1 + 2**-44), truth, truth, truth, torch.float64).ok


def test_parity_names_what_cannot_be_proved(device):
    inputs = options(device, dropout_p=0.5)
    with pytest.raises(ValueError, match="dropout_seed"):
        assert_parity(call, {**inputs, "dropout_seed": None})
    with pytest.raises(ValueError, match="frozen_routing"):
        assert_parity(call, inputs, dy=dy_for(inputs), gradients=["frozen_routing"])
    with pytest.raises(ValueError, match="lora_A"):
        assert_parity(call, inputs, gradients=["lora_A"])


def test_evaluate_leaves_the_inputs_alone(device):
    inputs = options(device)
    inputs["lora_A"].requires_grad_()
    results = evaluate(reference.forward, inputs, dy_for(inputs), ["lora_B"])
    assert set(results) == {"y", "lora_B"}
    assert inputs["lora_A"].grad is None and not inputs["lora_B"].requires_grad


def rounded_twice(x, weight, *args, bias, **kwargs):
    """The usual chain: a base output that is rounded, and an adapter added to it in 16 bit."""
    return torch.nn.functional.linear(x, weight, bias.to(x.dtype)) + adapter_term(x, *args, **kwargs).to(x.dtype)


@pytest.mark.parametrize("dtypes", ["bf16", "bf16+fp32", "fp16+fp32", "fp32"])
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_fidelity_passes_the_reference(device, dtypes, strength):
    inputs = options(device, dtypes, strength=strength, lead=(5, 200))
    fidelity = assert_fidelity(reference.forward(**inputs), **inputs)
    assert abs(fidelity.alpha - 1) <= fidelity.bound < 0.1
    inputs = {**inputs, "weight": torch.zeros_like(inputs["weight"]), "bias": None}
    assert_fidelity(reference.forward(**inputs), **inputs)


def test_fidelity_fails_what_parity_cannot_see(device):
    """An adapter of a thousandth of y that is absent, or half lost to rounding, is within the error of bf16."""
    inputs = options(device, strength=1e-3, lead=(5, 200), N=300)
    assert_parity(without_adapter, inputs)
    assert abs(adapter_fidelity(without_adapter(**inputs), **inputs).alpha) < 0.1
    for forward in (without_adapter, rounded_twice):
        with pytest.raises(AssertionError, match="adapter fidelity"):
            assert_fidelity(forward(**inputs), **inputs)


def without_adapter(**inputs):
    return reference.forward(**{**inputs, "lora_B": torch.zeros_like(inputs["lora_B"])})


@pytest.mark.parametrize("factor", [0.98, 1.02])
@pytest.mark.parametrize("dtypes", ["bf16+fp32", "fp16", "fp32"])
def test_fidelity_fails_an_adapter_of_another_strength(device, dtypes, factor):
    inputs = options(device, dtypes, strength=0.1, lead=(5, 200), N=300)
    assert_fidelity(reference.forward(**inputs), **inputs)
    with pytest.raises(AssertionError, match="adapter fidelity"):
        assert_fidelity(scaled(scaling=factor)(**inputs), **inputs)


def test_fidelity_knows_how_far_rounding_scatters_alpha(device):
    """Over many draws (α − 1)/σ has the variance of rounding, so σ is neither too tight nor loose.

    A variance of 64 normal draws leaves [0.3, 2.2] once in 10⁷ times.
    """
    deviations = []
    for seed in range(64):
        options_ = {"dtype": torch.bfloat16, "strength": 0.02, "bias": False}
        inputs = make_inputs((40,), 33, 47, 4, **options_, device=device, seed=seed)
        exact = inputs["x"].double() @ inputs["weight"].double().mT
        exact += adapter_term(**{k: v for k, v in inputs.items() if k != "weight"})
        fidelity = adapter_fidelity(exact.to(torch.bfloat16), **inputs)
        deviations.append((fidelity.alpha - 1) / fidelity.sigma)
    assert 0.3 < torch.tensor(deviations).square().mean() < 2.2


def test_fidelity_refuses_to_prove_nothing(device):
    inputs = options(device, strength=0.0)
    with pytest.raises(ValueError, match="adapter term is zero"):
        adapter_fidelity(reference.forward(**inputs), **inputs)
    inputs = options(device, strength=1e-6, lead=(2,), gate=None)
    with pytest.raises(ValueError, match="hides the adapter"):
        assert_fidelity(reference.forward(**inputs), **inputs)


@pytest.mark.parametrize("options_", [{"bank": 3}, {"dropout_p": 0.4}, {"routing": False}, {"frozen": False}])
def test_adapter_term_is_the_reference_without_its_base(device, options_):
    inputs = options(device, "fp64", **options_)
    for name in ("weight", "bias"):
        inputs[name] = None
    delta = adapter_term(**{k: v for k, v in inputs.items() if k not in ("weight", "bias")})
    assert_parity({"y": delta}, inputs)


def test_public_function_passes_as_its_signature_stands(device):
    inputs = options(device, dropout_p=0.2)
    for backend in ("auto", "aten", "reference"):
        assert_parity(partial(routed_lora_linear, backend=backend), inputs, dy=dy_for(inputs))
