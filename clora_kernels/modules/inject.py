"""Swap the linear layers of a model for adapted ones by name, and back; act on all adapted layers of a model at
once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from .adapter import AdapterLinear, why_not_adaptable, why_not_replaceable
from .routed_lora import RoutedLoRALinear

Targets = str | re.Pattern[str] | Iterable[str]


@dataclass(frozen=True)
class InjectReport:
    """What :func:`inject` did: names swapped, names that matched and were left alone with the reason, targets without a
    match."""

    swapped: list[str]
    left: list[tuple[str, str]]
    unmatched: list[str]

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}: {', '.join(self.swapped)}"]
        lines += [f"left alone {name}: {why}" for name, why in self.left]
        lines += [f"target {target!r} matched nothing" for target in self.unmatched]
        return "\n".join(lines)


def inject(model: nn.Module, factory: Callable[[nn.Module], nn.Module], targets: Targets) -> InjectReport:
    """Replace the linear layers of ``model`` that ``targets`` name by ``factory(layer)``, in place.

    Args:
        model: any module; a layer that stands in several places is made once and replaced in all of them, whichever a
            target names.
        factory: gets the nn.Linear (or Conv1D), returns its replacement, for instance
            ``lambda linear: RoutedLoRALinear.from_linear(linear, r=8)``.
        targets: as in PEFT: a list of names, each of which matches the end of a module's path at a dot (``"q_proj"``,
            ``"layers.0.q_proj"``), or one regular expression that matches whole paths.

    Returns:
        The report; print it. Layers that are adapted already, are not exactly nn.Linear or Conv1D, carry hooks or
        parametrisations, or sit where a parent reads their weight without calling them (nn.MultiheadAttention,
        nn.TransformerEncoderLayer) are left alone. Nothing is frozen: :func:`freeze_base` does that.

    Raises:
        ValueError: nothing was swapped; says what the model has instead. Targets that are no regular expression.
        TypeError: a model or targets of another type, a factory that cannot be called or returns no module. The model
            is as it was each time.
    """
    matches, unmatched = _match(model, targets)
    reasons = {module: why for _, module, parent in matches if (why := _why_left(module, parent)) is not None}
    made: dict[nn.Module, nn.Module] = {}
    for _, module, _ in matches:
        if module not in reasons and module not in made:
            made[module] = _made_by(factory, module)
    left = [(name, reasons[module]) for name, module, _ in matches if module in reasons]
    if not made:
        told = "".join(f"; {name} was left alone: {why}" for name, why in left[:5])
        got = f"{targets!r}, which swaps nothing in {type(model).__name__}"
        raise ValueError(f"targets: got {got} ({_linear_layers(model)}){told}")
    swapped = [name for name, module, _ in matches if module in made]
    for name, module, parent in matches:
        if module in made:
            setattr(parent, name.rpartition(".")[2], made[module])
    return InjectReport(swapped, left, unmatched)


def _linear_layers(model: nn.Module) -> str:
    if why_not_adaptable(model) is None:
        return "which is itself a linear layer and can only be swapped within a model"
    linear = [name for name, module, _ in _children(model) if why_not_adaptable(module) is None]
    return f"linear layers are {', '.join(linear[:10])}{', ...' if len(linear) > 10 else ''}" if linear else "none"


def _made_by(factory: Callable[[nn.Module], nn.Module], linear: nn.Module) -> nn.Module:
    if not callable(factory):
        raise TypeError(f"factory: got {type(factory).__name__}, expected a function of an nn.Linear")
    made = factory(linear)
    if not isinstance(made, nn.Module):
        raise TypeError(f"factory: got {type(made).__name__} from it, expected an nn.Module")
    return made


def extract(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Put the base layers back, without their adapters: the inverse of :func:`inject`; merged layers are unmerged
    first.

    Returns:
        name → ``adapter_state_dict()`` of every layer taken out, for ``load_adapter_state_dict`` after a later inject.

    Raises:
        ValueError: the model has no adapted layer, or is one itself. RuntimeError: one was merged with backup=None.
    """
    if isinstance(model, AdapterLinear):
        raise ValueError(f"model: got a {type(model).__name__} itself, expected a model in which to put its base layer")
    adapters: dict[str, dict[str, Tensor]] = {}
    plain: dict[nn.Module, nn.Module] = {}
    for layer in _adapted(model).values():
        layer.check_restorable()
    for layer in _adapted(model).values():
        layer.unmerge()
        plain[layer] = layer.to_linear()
    for name, module, parent in _children(model):
        if isinstance(module, AdapterLinear):
            adapters[name] = module.adapter_state_dict()
            setattr(parent, name.rpartition(".")[2], plain[module])
    return adapters


def merge_all(model: nn.Module, backup: str | None = "device") -> list[str]:
    """Put every adapter of ``model`` into its layer's weight: inference at the cost of the plain model.

    Args:
        backup: where the original weights wait for :func:`unmerge_all`, as much memory again: "device", "cpu", or None,
            which keeps nothing and cannot be undone.

    Returns:
        The names of the layers. They compute in eval mode alone; a merged layer in training mode raises. One of rank-1
        experts computes those it used most, whatever its input would choose: see its ``merge``.

    Raises:
        ValueError: no adapted layer; an unknown backup; a layer with a bank of routings; with a backup other than
            "device", a weight that is also another module's, which would get the adapter too.
        RuntimeError: a layer that was merged with backup=None. The model is as it was each time.
    """
    layers = _adapted(model)
    for layer in layers.values():
        layer.check_mergeable()
        layer.check_restorable()
    if backup != "device":
        _check_untied(model, layers, backup)
    for layer in layers.values():
        layer.merge(backup=backup)
    return list(layers)


def unmerge_all(model: nn.Module) -> list[str]:
    """Restore every original weight of ``model`` bit for bit; layers that are not merged stay as they are.

    Returns:
        The names of all adapted layers.

    Raises:
        ValueError: no adapted layer.
        RuntimeError: one was merged with backup=None; the model is as it was.
    """
    layers = _adapted(model)
    for layer in layers.values():
        layer.check_restorable()
    for layer in layers.values():
        layer.unmerge()
    return list(layers)


def freeze_base(model: nn.Module) -> list[str]:
    """Leave only adapters trainable: ``requires_grad`` False everywhere else. Raises ValueError if there is no adapter.

    Returns:
        The names of the parameters that are trainable now. An adapter parameter that was frozen stays so.
    """
    keep = {p for layer in _adapted(model).values() for p in layer.adapter_parameters()}
    for parameter in model.parameters():
        if parameter not in keep:
            parameter.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def to_lora(model: nn.Module) -> dict[str, Tensor]:
    """Fold every routing (frozen and live) into lora_B: ordinary LoRA of the same rank and ``scaling``, equal outputs.

    Returns:
        The adapter under the names of PEFT's files (``base_model.model.<layer>.lora_A.weight``, ...), detached: what
        ``peft.set_peft_model_state_dict`` takes. PEFT's ``lora_alpha`` is then ``scaling``·rank of lora_A;
        ``clora_kernels.integrations.peft.save_pretrained`` writes that too.

    Raises:
        ValueError: no routed LoRA layer, one with a bank of routings, or an adapter that is no LoRA, as where the input
            chooses experts; RuntimeError: one that was merged with backup=None; the model is as it was.
    """
    layers = _routed(model)
    for layer in layers.values():
        layer.check_mergeable()
        layer.check_restorable()
    for layer in layers.values():
        layer.fold_routing()
    return lora_state_dict(model)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What :func:`to_lora` returns, for a model that stays as it is: with its routings, in training or merged.

    Raises:
        ValueError: no adapted layer, one with a bank of routings, or an adapter that is no LoRA.
    """
    state: dict[str, Tensor] = {}
    for name, layer in _routed(model).items():
        lora_A, lora_B = layer.lora_tensors()
        state[f"base_model.model.{name}.lora_A.weight"] = lora_A
        state[f"base_model.model.{name}.lora_B.weight"] = lora_B
    return state


def _routed(model: nn.Module) -> dict[str, RoutedLoRALinear]:
    layers = {}
    if isinstance(model, AdapterLinear):
        raise ValueError(
            f"model: got a {type(model).__name__} itself, which has no name in a file, expected a model of it"
        )
    for name, layer in _adapted(model).items():
        if not isinstance(layer, RoutedLoRALinear):
            raise ValueError(
                f"model: got a {type(layer).__name__} at {name!r}, which no LoRA equals, expected RoutedLoRALinear "
                "layers alone; extract() takes adapters out, a layer's fold() puts one into its weight"
            )
        layers[name] = layer
    return layers


def _check_untied(model: nn.Module, layers: dict[str, AdapterLinear], backup: str | None) -> None:
    owners: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append(f"{name}.{own}" if name else own)
    for layer in layers.values():
        names = owners[layer.weight]
        if len(names) > 1:
            raise ValueError(
                f"backup: got {backup!r} for the weight that {' and '.join(names)} share, expected 'device', which "
                "leaves the others' alone"
            )


def _adapted(model: nn.Module) -> dict[str, AdapterLinear]:
    _check_model(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without an adapted layer, expected at least one")
    return layers


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path, module, parent) of everything below ``model`` but the parts of adapters, shared modules once for each path
    to them."""
    modules = list(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." if name else "" for name, module in modules if isinstance(module, AdapterLinear))
    for parent_name, parent in modules:
        for child_name, child in list(parent._modules.items()):
            path = f"{parent_name}.{child_name}" if parent_name else child_name
            if child is not None and not path.startswith(inside):
                yield path, child, parent


def _match(model: nn.Module, targets: Targets) -> tuple[list[tuple[str, nn.Module, nn.Module]], list[str]]:
    """Children that a target names, with the other places they stand in, and targets that name nothing. A regular
    expression that matches containers is fine."""
    _check_model(model)
    children = list(_children(model))
    if isinstance(targets, (str, re.Pattern)):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets: got {targets!r}, expected a regular expression: {error}") from None
        leaves = [c for c in children if not c[1]._modules or isinstance(c[1], AdapterLinear)]
        named = {pattern.pattern: [c for c in leaves if pattern.fullmatch(c[0])]}
    elif not isinstance(targets, Iterable):
        raise TypeError(f"targets: got {type(targets).__name__}, expected names or one regular expression")
    else:
        targets = list(targets)
        for i, t in enumerate(targets):
            if not isinstance(t, str):
                raise TypeError(f"targets[{i}]: got {type(t).__name__}, expected a name; an expression stands alone")
        named = {t: [c for c in children if c[0] == t or c[0].endswith("." + t)] for t in targets}
    matches = {place[0]: place for found in named.values() for place in found}
    modules = {module for _, module, _ in matches.values()}
    matches |= {place[0]: place for place in children if place[1] in modules}
    return list(matches.values()), [target for target, found in named.items() if not found]


def _why_left(module: nn.Module, parent: nn.Module) -> str | None:
    if isinstance(module, AdapterLinear):
        return "it is adapted already"
    if (why := why_not_replaceable(module)) is not None:
        return why
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer's inference path reads its weight without calling it"
    return None
