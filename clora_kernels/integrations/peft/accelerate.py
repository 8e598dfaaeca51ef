"""A PEFT model made faster in place, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...modules.sharded import is_sharded


@dataclass(frozen=True)
class Acceleration:
    """What became of the LoRA layers of a model, as they are when it is asked.

    Attributes:
        layers: every LoRA layer of the model by name.
    """

    layers: Mapping[str, Any]

    @property
    def accelerated(self) -> dict[str, str]:
        """The layers whose next call takes routed LoRA: by name, how."""
        states = {name: _state(layer) for name, layer in self.layers.items()}
        return {name: how for name, (why, how) in states.items() if why is None}

    @property
    def left_alone(self) -> dict[str, str]:
        """The layers whose next call PEFT's own forward takes: by name, why."""
        return {name: why for name, layer in self.layers.items() if (why := _state(layer)[0]) is not None}

    @property
    def fell_back(self) -> dict[str, str]:
        """The accelerated layers of which PEFT's own forward took a call: by name, why the last one."""
        reasons = {name: getattr(layer, "fell_back", None) for name, layer in self.layers.items()}
        return {name: why for name, why in reasons.items() if why is not None}

    def __str__(self) -> str:
        lines = []
        for what, layers in (
            ("accelerated", self.accelerated),
            ("left to PEFT", self.left_alone),
            ("left a call to PEFT", self.fell_back),
        ):
            by_reason: dict[str, list[str]] = {}
            for name, reason in layers.items():
                by_reason.setdefault(reason, []).append(name)
            lines += [f"{what}, {reason}: {len(names)}: {', '.join(names)}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Acceleration:
    """Let every eligible LoRA layer of a PEFT model compute by routed LoRA, in place::

        model = get_peft_model(model, LoraConfig(...))
        print(accelerate(model))

    A layer changes its class, to a subclass of what it was, and nothing else: parameters, their names, the keys of
    ``state_dict`` and everything that PEFT does with a layer (saving and loading, more adapters, switching, disabling,
    merging, deleting) stay as they are. Adapters of new layers that come later are accelerated by another call.

    Same numbers, precisely. fp32 and fp64: equal up to rounding. 16 bit: where the base layer is an nn.Linear or Conv1D
    base and adapter are one sum that is rounded once, which is closer to the exact y than PEFT's chain as long as the
    adapter's part of y is the smaller one; on a base that gives a rounded output (quantised, hooked) no worse than
    PEFT. Adapters in fp32 are rounded to x.dtype once and x is not cast up, so their gradients are exact to x.dtype
    where PEFT's are to fp32; both come in fp32. Dropout drops with the same probability, not the same elements.

    Eligible are exact types only: PEFT's LoRA of a linear layer, plain or quantised by bitsandbytes or torchao, whose
    adapters are plain LoRA (no DoRA, aLoRA or other variant), without a bias of their own, without hooks on their
    parts. What is not, or becomes so later, goes through PEFT's own forward, which the report shows. Batches whose
    samples name their adapters (``adapter_names``) are one call too, up to 256 ranks and without dropout.

    Args:
        model: a PeftModel, or any module that holds LoRA layers of PEFT.

    Returns:
        The report; it looks at the layers when it is read.

    Raises:
        ImportError: without peft.
        ValueError: no LoRA layer of PEFT in the model.
    """
    from peft.tuners.lora.layer import LoraLayer

    from .layers import TYPES

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without a LoRA layer of PEFT, expected at least one")
    for layer in layers.values():
        layer.__class__ = TYPES.get(type(layer), type(layer))
    return Acceleration(layers)


def restore(model: nn.Module) -> list[str]:
    """Give every accelerated layer of ``model`` PEFT's own class back; their names."""
    from .layers import TYPES

    own = {ours: theirs for theirs, ours in TYPES.items()}
    restored = []
    for name, layer in model.named_modules():
        if type(layer) in own:
            layer.__class__ = own[type(layer)]
            vars(layer).pop("fell_back", None)
            restored.append(name)
    return restored


def _state(layer: Any) -> tuple[str | None, str]:
    """(why PEFT's own forward takes the next call or None, how it is computed)."""
    from .layers import TYPES, Accelerated, why_not_fused

    if type(layer) in TYPES:
        return "accelerate() was not called since it was made or restored", ""
    if not isinstance(layer, Accelerated):
        known = ", ".join(sorted(kind.__name__ for kind in TYPES))
        return f"{type(layer).__name__} is not one of {known}", ""
    parts = layer.parts(layer.active_adapters)
    if layer.disable_adapters or layer.merged or not parts:
        off = "are disabled" if layer.disable_adapters else "are merged" if layer.merged else "are not active"
        return None, f"the base layer alone while its adapters {off}"
    if (left := layer.why_left(parts, gathered=True)) is not None:
        return left, ""
    modules = [layer.base_layer, *(linear for A, B, _ in parts.values() for linear in (A, B))]
    if any(is_sharded(p) for module in modules for p in module.parameters()):
        return None, "in calls for which its sharded weights are gathered (fell_back tells of others)"
    if (apart := why_not_fused(layer.base_layer)) is not None:
        return None, f"on the output of its base layer ({apart})"
    return None, "in one sum with its base layer"
