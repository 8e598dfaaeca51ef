"""Trained adapters as the files that PEFT, and whatever serves PEFT's adapters, reads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ...modules.inject import lora_state_dict
from ...modules.routed_lora import RoutedLoRALinear

T = TypeVar("T")


def save_pretrained(model: nn.Module, directory: str | Path, base_model_name_or_path: str | None = None) -> None:
    """What :func:`clora_kernels.to_lora` makes of ``model``, written as PEFT writes an adapter: ``adapter_config.json``
    and ``adapter_model.safetensors``, which ``PeftModel.from_pretrained(plain_model, directory)`` loads.

    Args:
        model: stays as it is, with its routings, in training or merged.
        directory: made if it is not there; the two files in it are written anew.
        base_model_name_or_path: what the config names as the plain model; PEFT's Auto classes load it by that.

    Raises:
        ValueError: no routed LoRA layer, or one with a bank of routings; nothing is written then.
        ImportError: without safetensors.
    """
    from safetensors.torch import save_file

    state = lora_state_dict(model)
    config = lora_config(model, base_model_name_or_path)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: t.contiguous() for k, t in state.items()}, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def lora_config(model: nn.Module, base_model_name_or_path: str | None = None) -> dict[str, Any]:
    """The fields of the ``peft.LoraConfig`` that describes what ``to_lora`` makes of ``model``.

    PEFT has one dropout for all layers: that of most layers is taken.

    Raises:
        ValueError: no routed LoRA layer, or one with a bank of routings.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, RoutedLoRALinear)}
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without a routed LoRA layer, expected at least one")
    for layer in layers.values():
        layer.check_mergeable()
    ranks = {name: layer.adapter_tensors()[0].shape[0] for name, layer in layers.items()}
    alphas = {name: layer.scaling_value() * ranks[name] for name, layer in layers.items()}
    r, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "target_modules": _targets(model, layers),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {_exactly(name): its for name, its in alphas.items() if its != alpha},
        "lora_dropout": _commonest(layer.dropout_p for layer in layers.values()),
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
        "bias": "none",
    }


def _commonest(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def _exactly(name: str) -> str:
    """The pattern that PEFT finds in this path alone: it lets others stand before it, up to a dot."""
    return f"^{re.escape(name)}"


def _targets(model: nn.Module, layers: Iterable[str]) -> list[str] | str:
    """Last parts of the layers' names as people write them, if they name nothing else; else one regular expression."""
    names = set(layers)
    ends = {name.rpartition(".")[2] for name in names}
    if {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends} == names:
        return sorted(ends)
    return "|".join(map(re.escape, sorted(names)))
