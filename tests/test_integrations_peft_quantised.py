"""Accelerated LoRA on quantised bases: the base computes its own output, in its own dtype, and is never cast up."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import results
from torch import nn

from clora_kernels.integrations.peft import accelerate, restore

K, N = 64, 48


def bits4(linear: nn.Linear) -> nn.Module:
    quantised = bitsandbytes.nn.Linear4bit(K, N, compute_dtype=linear.weight.dtype, quant_type="nf4")
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


def bits8(linear: nn.Linear) -> nn.Module:
    quantised = bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


def torchao_int8(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


BASES: dict[str, tuple[Callable[[nn.Linear], nn.Module], dict[str, bool], str]] = {
    "bitsandbytes 4 bit": (bits4, {"is_loaded_in_4bit": True}, "Linear4bit is neither nn.Linear nor Conv1D"),
    "bitsandbytes 8 bit": (bits8, {"is_loaded_in_8bit": True}, "Linear8bitLt is neither nn.Linear nor Conv1D"),
    "torchao int8": (torchao_int8, {}, "its weight is a Int8Tensor"),
}


def model_of(base: str, dtype: torch.dtype = torch.float32, **options: float) -> PeftModel:
    torch.manual_seed(0)
    quantise, flags, _ = BASES[base]
    model = nn.Sequential(quantise(nn.Linear(K, N).to(dtype)))
    for name, value in flags.items():
        setattr(model, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that a torchao layer made by hand cannot be merged
        peft = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], **options))
    with torch.no_grad():
        peft.base_model.model[0].lora_B["default"].weight.normal_(std=0.1)
    return peft


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_numbers_on_the_output_of_the_base(base: str, dtype: torch.dtype) -> None:
    model = model_of(base, dtype)
    other = copy.deepcopy(model)
    report = accelerate(other)
    assert report.accelerated == {"base_model.model.0": f"on the output of its base layer ({BASES[base][2]})"}
    layer, x, dy = other.base_model.model[0], torch.randn(6, K, dtype=dtype), torch.randn(6, N, dtype=dtype)
    theirs, ours = (results(m, x, dy) for m in (model, other))
    assert theirs.keys() == ours.keys() and not report.fell_back
    # What the adapter adds to the output that the base gives, exactly.
    A, B = (getattr(layer, f"lora_{part}")["default"].weight.detach().double() for part in "AB")
    with torch.no_grad():
        given = layer.base_layer(x)
    assert given.dtype == dtype
    truth = {
        "y": given.double() + layer.scaling["default"] * x.double() @ A.mT @ B.mT,
        "base_model.model.0.lora_A.default.weight": layer.scaling["default"] * (dy.double() @ B).mT @ x.double(),
        "base_model.model.0.lora_B.default.weight": layer.scaling["default"] * dy.double().mT @ (x.double() @ A.mT),
    }
    for name, exact in truth.items():
        assert ours[name].dtype == theirs[name].dtype
        errors = [float((value[name].double() - exact).norm() / exact.norm()) for value in (ours, theirs)]
        # In 16 bit the factors are rounded once, which PEFT's fp32 adapters are not.
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("base", BASES)
def test_training_moves_the_adapter_alone_and_goes_as_with_peft(base: str) -> None:
    models = [model_of(base), model_of(base)]
    accelerate(models[1])
    x, target = torch.randn(32, K), torch.randn(32, N)
    with torch.no_grad():
        frozen = models[1].base_model.model[0].base_layer(x)
    losses = []
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(5):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[1][-1] < losses[1][0]
    with torch.no_grad():
        assert torch.equal(models[1].base_model.model[0].base_layer(x), frozen)


def test_a_layer_gets_its_own_class_back() -> None:
    for base in BASES:
        model = model_of(base)
        kind = type(model.base_model.model[0])
        accelerate(model)
        assert type(model.base_model.model[0]).__mro__[2] is kind
        assert restore(model) == ["base_model.model.0"] and type(model.base_model.model[0]) is kind


def test_dropout_and_merging_stay_as_they_are() -> None:
    model = model_of("bitsandbytes 8 bit", lora_dropout=0.5).train()
    accelerate(model)
    x = torch.randn(4, K)
    assert not torch.equal(model(x), model(x))
    model.eval()
    y = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes', that merging rounds
        model.merge_adapter()
    merged = model(x)
    assert (merged - y).norm() < 0.05 * y.norm() and model.base_model.model[0].merged
