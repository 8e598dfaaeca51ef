"""A routed adapter of PEFT as an ordinary LoRA of the same rank, for whatever knows LoRA alone."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from ....reference.routed_lora import accumulation_dtype
from .layer import RoutedLinear
from .model import TENSORS, adapters_of, config_of

PREFIX = "base_model.model."

# Fields of the config that mean in LoRA what they mean here.
SAME = (
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "r", "target_modules", "exclude_modules",
    "lora_alpha", "use_rslora", "lora_dropout", "bias", "modules_to_save", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern",
)  # fmt: skip


@torch.no_grad()
def to_lora(model: nn.Module, adapter_name: str | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA that computes what a routed adapter does: lora_B·(R_old + R)ᵀ in the place of lora_B, rounded once.

    Args:
        model: a PeftModel, or any model into which PEFT put routed layers; stays as it is.
        adapter_name: None for the one that is active.

    Returns:
        The config, and the tensors by the names of PEFT's files, ``modules_to_save`` and biases that learn among them.

    Raises:
        ValueError: no routed layer, none with this adapter, or several active ones and no name.
    """
    names, layers = adapters_of(model, adapter_name)
    if len(names) > 1:
        raise ValueError(f"adapter_name: got None while {names} are active, expected the name of one")
    name = names[0]
    config = config_of(model, name)
    state = {
        key if key.startswith(PREFIX) else PREFIX + key: tensor
        for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items()
        if key.rpartition(".")[2] not in TENSORS
    }
    for path, layer in model.named_modules():
        if isinstance(layer, RoutedLinear) and name in layer.lora_A:
            A, B, R, R_old = layer.adapter_tensors(name)
            acc = accumulation_dtype(B.dtype)
            key = path if path.startswith(PREFIX) else PREFIX + path
            state[f"{key}.lora_A.weight"] = A.detach().clone()
            state[f"{key}.lora_B.weight"] = (B.to(acc) @ (R.to(acc) + R_old.to(acc)).mT).to(B.dtype)
    transposed = [not isinstance(layer.get_base_layer(), nn.Linear) for layer in layers if name in layer.lora_A]
    return LoraConfig(**{field: getattr(config, field) for field in SAME}, fan_in_fan_out=all(transposed)), state


def save_as_lora(model: nn.Module, directory: str | Path, adapter_name: str | None = None) -> None:
    """What :func:`to_lora` gives, as the two files that ``PeftModel.from_pretrained(plain_model, directory)`` loads.

    Args:
        model, adapter_name: as in :func:`to_lora`.
        directory: made if it is not there; the two files in it are written anew.

    Raises:
        ValueError: as :func:`to_lora`; nothing is written then.
    """
    from safetensors.torch import save_file

    config, state = to_lora(model, adapter_name)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: t.contiguous() for k, t in state.items()}, directory / "adapter_model.safetensors", {"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(directory))
