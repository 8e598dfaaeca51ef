"""Proof that the adapted layers of a user's model compute what the reference says, on the user's own batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.routed_lora import routed_lora_linear
from ..modules.routed_lora import RoutedLoRALinear
from ..testing import Deviation, assert_parity


def assert_model_parity(
    model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype | None = None
) -> dict[str, dict[str, Deviation]]:
    """Prove y and every gradient of every routed LoRA layer of ``model``, on the x and dy it sees in one step.

    Each layer's own arguments go through its own backend and are held against fp64 by the rule of
    :func:`clora_kernels.testing.assert_parity`.

    Args:
        model: not merged; a layer that is called several times is proved on its last call.
        loss: runs the model in training mode and returns a 0-dim loss.
        dtype: prove with x, weight, bias and dy rounded to this one (the adapter in its own); None: as they are.

    Returns:
        name → result → how far it is and may be.

    Raises:
        AssertionError: naming the first layer that does not pass, and by how much.
        ValueError: no routed LoRA layer was called.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, RoutedLoRALinear)}
    seen: dict[str, dict[str, Tensor]] = {name: {} for name in layers}

    def catch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], y: Tensor) -> None:
            call = seen[name] = {k: v.detach() for k, v in options.items() if isinstance(v, Tensor)}
            if inputs:
                call["x"] = inputs[0].detach()
            if y.requires_grad:
                y.register_hook(lambda dy: call.__setitem__("dy", dy.detach()))

        return hook

    handles = [layer.register_forward_hook(catch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        # Gradients with respect to x reach every layer without touching the parameters' own .grad.
        value = loss()
        torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    proved: dict[str, dict[str, Deviation]] = {}
    for name, layer in layers.items():
        if "dy" not in seen[name]:
            continue
        dy = seen[name].pop("dy")
        inputs, dy = _inputs(layer, seen[name], dtype), dy.to(dtype or dy.dtype)
        backend = layer.backend
        try:
            proved[name] = assert_parity(
                lambda _backend=backend, **arguments: routed_lora_linear(**arguments, backend=_backend), inputs, dy=dy
            )
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    if not proved:
        raise ValueError(f"model: got {type(model).__name__}, in which no routed LoRA layer took part in the loss")
    return proved


def _inputs(layer: RoutedLoRALinear, called_with: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Any]:
    """The layer's call as the reference's forward takes it, with a seed of its own where it drops."""
    inputs = layer.call_arguments(**called_with)
    if not inputs.pop("training"):
        inputs["dropout_p"] = 0.0
    if inputs["dropout_p"] and inputs["dropout_seed"] is None:
        inputs["dropout_seed"] = torch.randint(2**63 - 1, (), device=inputs["x"].device)
    del inputs["backend"]
    for name in ("x", "weight", "bias"):
        if dtype is not None and inputs[name] is not None:
            inputs[name] = inputs[name].to(dtype)
    return inputs
