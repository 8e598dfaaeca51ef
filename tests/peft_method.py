"""Models with routed LoRA as a method of PEFT, for its tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft_models import WIDTHS, Two
from torch import Tensor, nn

from clora_kernels import RoutedLoRALinear
from clora_kernels.integrations.peft import RoutedLoraConfig

KINDS = ("lora_A", "lora_B", "lora_routing", "lora_frozen_routing")
K, N = WIDTHS
LINEAR, CONV = "base_model.model.linear", "base_model.model.conv"
NAMES = ("first", "second", "third")


def config(**options: Any) -> RoutedLoraConfig:
    return RoutedLoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["linear", "conv"], **options})


def two(dtype: torch.dtype = torch.float32) -> Two:
    torch.manual_seed(7)
    model = Two()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return model.to(dtype)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` with random values in every adapter, R_old too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if any(f".{kind}." in f".{name}" for kind in KINDS):
                tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    return model


def routed(*configs: RoutedLoraConfig, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """Two with an adapter for each config, named "first", "second", ..., all values random and the first active."""
    model = get_peft_model(two(dtype), configs[0], adapter_name=NAMES[0], **options)
    for name, other in zip(NAMES[1:], configs[1:], strict=False):
        model.add_adapter(name, other, **options)
    randomized(model)
    return model


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_frozen_routing")}


def as_our_own(layer: Any, adapter_name: str) -> RoutedLoRALinear:
    """The package's layer around a copy of the same base, with the same adapter."""
    A, B, R, R_old = layer.adapter_tensors(adapter_name)
    own = RoutedLoRALinear.from_linear(
        copy.deepcopy(layer.base_layer),
        A.shape[0],
        frozen_routing=True,
        scaling=layer.scaling[adapter_name],
        dropout_p=layer.lora_dropout[adapter_name],
        adapter_dtype=A.dtype,
    )
    own.load_adapter_state_dict({"lora_A": A, "lora_B": B, "routing": R, "frozen_routing": R_old})
    own.weight.requires_grad_(False)
    return own.train(layer.training)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def call(*lead: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x and dy of Two."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(*lead, size, generator=generator).to(dtype) for size in (K, N))
    return x, dy


def learning(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def of(adapter: str, *kinds: str) -> set[str]:
    return {f"{layer}.{kind}.{adapter}" for layer in (LINEAR, CONV) for kind in kinds or KINDS[:3]}
