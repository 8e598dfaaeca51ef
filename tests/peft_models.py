"""PEFT models for the tests of what accelerates them, and what they compute."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clora_kernels.testing.parity import compare

WIDTHS = (13, 22)


class Two(nn.Module):
    """A linear layer and a Conv1D of the same x; nothing between them and the result is nonlinear, so that the rule of
    parity finds the magnitude of its sums in absolute values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(*WIDTHS), Conv1D(WIDTHS[1], WIDTHS[0])

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.linear(x, **options) + self.conv(x, **options)


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["linear", "conv"], **options})


def quiet(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What ``make`` makes; PEFT sees by itself which layers are Conv1D, and warns each time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        return make(*args, **options)


def peft_model(*configs: LoraConfig, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """Two with an adapter for each config, named "first", "second", ..., all values random and the first active."""
    torch.manual_seed(0)
    names = ("first", "second", "third")
    model: PeftModel = quiet(get_peft_model, Two().to(dtype), configs[0], adapter_name=names[0], **options)
    for name, other in zip(names[1:], configs[1:], strict=False):
        quiet(model.add_adapter, name, other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return model


def results(model: nn.Module, x: Tensor, dy: Tensor, **options: Any) -> dict[str, Tensor]:
    """y, dx and the gradient of every parameter that has one."""
    x = x.detach().clone().requires_grad_()
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = model(x, **options)
    gradients = torch.autograd.grad(y, [x, *wanted.values()], dy, allow_unused=True)
    named = dict(zip(["dx", *wanted], gradients, strict=True))
    return {"y": y.detach(), **{name: g for name, g in named.items() if g is not None}}


def assert_as_good(model: nn.Module, accelerated: nn.Module, x: Tensor, dy: Tensor, **options: Any) -> None:
    """Every result of ``accelerated`` passes the rule of parity, the plain PEFT model in the reference's place."""
    reference, actual = results(model, x, dy, **options), results(accelerated, x, dy, **options)
    assert actual.keys() == reference.keys()
    wide, sums = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    with torch.no_grad():
        for parameter in sums.parameters():
            parameter.abs_()
    truth = results(wide, x.double(), dy.double(), **options)
    magnitude = results(sums, x.double().abs(), dy.double().abs(), **options)
    accumulation = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, value in actual.items():
        found = compare(value, truth[name], reference[name], magnitude[name], accumulation)
        assert found.ok, f"{name}: {found}"
