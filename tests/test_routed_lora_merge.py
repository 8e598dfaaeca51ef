"""The adapter in the weight: equal to the layer, rounded once, nothing changed."""

from __future__ import annotations

import pytest
import torch
from strategies import DTYPES, tensors_of

from clora_kernels import merge_routed_lora
from clora_kernels.reference.routed_lora import accumulation_dtype
from clora_kernels.reference.routed_lora_samples import make_inputs
from clora_kernels.testing import assert_fidelity, assert_parity, compare, unchanged

OPTIONS = {
    "plain": {"routing": False},
    "routed": {},
    "everything": {"frozen": True, "gate": (5,), "scaling": None},
    "rank_1": {"r": 1, "gate": (1,)},
    "rank_above_sizes": {"r": 53, "frozen": True},
}


def arguments(device, options, dtypes="fp32", **more):
    dtype, adapter_dtype = DTYPES[dtypes]
    inputs = make_inputs(**{**OPTIONS[options], **more}, dtype=dtype, adapter_dtype=adapter_dtype, device=device)
    return inputs, {k: v for k, v in inputs.items() if k not in ("x", "bias")}


def formula(dtype, weight, lora_A, lora_B, routing=None, *, frozen_routing=None, gate=None, scaling=1.0):
    """weight + s·B·(R_frozen + R)ᵀ·diag(gate)·A in ``dtype``, sum by sum."""
    small = lora_B.to(dtype)
    if routing is not None:
        total = routing.to(dtype) + (0 if frozen_routing is None else frozen_routing.to(dtype))
        small = torch.einsum("nt,rt->nr", small, total)
    small = small * (1 if gate is None else gate.to(dtype)) * scaling
    return weight.to(dtype) + torch.einsum("nr,rk->nk", small, lora_A.to(dtype))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_merge_is_its_formula_rounded_once(device, options, dtypes):
    _, merge = arguments(device, options, dtypes)
    with unchanged(*tensors_of(merge)):
        merged = merge_routed_lora(**merge)
    weight = merge["weight"]
    acc = accumulation_dtype(weight.dtype)
    magnitude = formula(torch.float64, **{k: v.abs() if isinstance(v, torch.Tensor) else v for k, v in merge.items()})
    plain = formula(acc, **merge).to(weight.dtype)
    deviation = compare(merged, formula(torch.float64, **merge), plain, magnitude, acc)
    assert deviation.ok, str(deviation)
    assert merged.is_contiguous() and merged.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("options", OPTIONS)
def test_a_linear_of_the_merged_weight_is_the_layer(device, options):
    inputs, merge = arguments(device, options, "fp64")
    y = torch.nn.functional.linear(inputs["x"], merge_routed_lora(**merge), inputs["bias"])
    assert_parity({"y": y}, inputs)


@pytest.mark.parametrize("dtypes", ["bf16", "bf16+fp32", "fp16+fp32"])
@pytest.mark.parametrize("strength", [1e-2, 1.0])
def test_a_small_adapter_survives_the_merge(device, dtypes, strength):
    """The merged weight is the layer's output for x = I."""
    _, merge = arguments(device, "everything", dtypes, K=193, N=271, strength=strength)
    eye = torch.eye(193, dtype=merge["weight"].dtype, device=device)
    assert_fidelity(merge_routed_lora(**merge).mT, eye, **merge)


def test_rows_can_be_merged_block_by_block(device):
    _, merge = arguments(device, "everything", "fp64")
    rows = [slice(0, 11), slice(11, 29)]
    blocks = [merge_routed_lora(**{**merge, "weight": merge["weight"][r], "lora_B": merge["lora_B"][r]}) for r in rows]
    whole = merge_routed_lora(**merge)
    magnitude = merge["weight"].abs() + 1
    assert compare(torch.cat(blocks), whole, whole, magnitude, torch.float64).ok


def test_autocast_does_not_reach_a_merge(device):
    _, merge = arguments(device, "everything")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        merged = merge_routed_lora(**merge)
    assert torch.equal(merged, merge_routed_lora(**merge))


def test_merge_of_nothing(device):
    _, merge = arguments(device, "routed")
    zero = {**merge, "lora_B": torch.zeros_like(merge["lora_B"])}
    assert torch.equal(merge_routed_lora(**zero), merge["weight"])
