"""The tuner: where PEFT puts routed layers, what it saves and loads of them, and the hand-over between tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ....modules.sharded import gathered
from .config import RoutedLoraConfig, RoutedLoraType
from .layer import RoutedLinear, features

TENSORS = ("lora_A", "lora_B", "lora_routing", "lora_frozen_routing")


class RoutedLoraModel(BaseTuner):
    """What ``get_peft_model(model, RoutedLoraConfig(...))`` wraps ``model`` in.

    Saving keeps both routings, under the method's own type: read as LoRA, they would be dropped without a word;
    :func:`to_lora` is the way there.

    A file that does not fit (a tensor missing, of another shape or of another layer; truncated; a config with fields
    of a later version) is an error. PEFT adds an adapter before it reads its tensors, so where these are at fault the
    new adapter is there, untrained and inactive; ``delete_adapter`` takes it out. An adapter that was there before
    keeps its values: nothing is written unless all fits, so that ``ignore_mismatched_sizes`` has nothing to ignore.
    """

    prefix = "lora_"
    tuner_layer_cls = RoutedLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Every target is one that can be adapted, before the first of them is."""
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if not name or name.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (f"{name}.",)
            if peft_config.target_modules != "all-linear" and self._check_target_module_exists(peft_config, name):
                try:
                    features(module)
                except TypeError as error:
                    raise TypeError(f"{error}; it is {name!r}") from None

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, RoutedLinear):
            target.update_layer(adapter_name, current_key, peft_config)
        else:
            layer = RoutedLinear(target, adapter_name, current_key, peft_config)
            self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        """No layer is merged unless every one can be."""
        super()._check_merge_allowed()
        for layer in self.modules():
            if isinstance(layer, RoutedLinear):
                layer.mergeable_weight()

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse what PeftModel would drop without a word."""
        if (names := kwargs.get("adapter_names")) is not None:
            raise ValueError(
                f"adapter_names: got {names!r}, expected None: routed LoRA has no batches of several adapters"
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's, strictly: nothing is written unless every tensor of the adapter is there in its shape."""
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = {
            f"{name}.{kind}.{adapter_name}": getattr(layer, kind)[adapter_name]
            for name, layer in model.named_modules()
            if isinstance(layer, RoutedLinear) and adapter_name in layer.lora_A
            for kind in TENSORS
        }
        if missing := sorted(own.keys() - state.keys()):
            raise ValueError(f"state_dict: misses {missing}, expected every tensor of adapter {adapter_name!r}")
        if unexpected := sorted(k for k in state if k.rpartition(".")[2] in TENSORS):
            raise ValueError(f"state_dict: holds {unexpected}, of which adapter {adapter_name!r} has none")
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                got, expected = tuple(state[name].shape), tuple(tensor.shape)
                raise ValueError(f"state_dict[{name!r}]: got shape {got}, expected {expected}")
        return state


@torch.no_grad()
def next_task(model: nn.Module, adapter_name: str | None = None) -> None:
    """C-LoRA's hand-over at the end of a task (arXiv 2502.17920): R_old ← R_old + R, R ← 0.

    The model computes what it did (an adapter in 16 bit: to the rounding of R_old). R starts anew: give the next task
    an optimizer of its own, or its momentum moves R on. Of a sharded model every rank calls it.

    Args:
        model: a PeftModel, or any model into which PEFT put routed layers.
        adapter_name: None for the active ones.

    Raises:
        ValueError: no routed layer, or none with this adapter; nothing is changed then.
    """
    names, layers = adapters_of(model, adapter_name)
    for name in names:
        config = config_of(model, name)
        config.task += 1
        for layer in layers:
            if name in layer.lora_A:
                _, _, R, R_old = layer.adapter_tensors(name)
                R_old += gathered(R)
                R.zero_()
                if config.frozen_factors:
                    layer.freeze_factors(name)


def config_of(model: Any, adapter_name: str) -> RoutedLoraConfig:
    """The config of an adapter: PeftModel, its tuner and transformers' models hold it under one name."""
    return model.peft_config[adapter_name]


def adapters_of(model: nn.Module, adapter_name: str | None) -> tuple[list[str], list[RoutedLinear]]:
    """(names of the adapters that are meant, every routed layer); None means the active ones."""
    layers = [layer for layer in model.modules() if isinstance(layer, RoutedLinear)]
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without a routed layer of PEFT, expected at least one")
    there = {name for layer in layers for name in layer.lora_A}
    names = layers[0].active_adapters if adapter_name is None else [adapter_name]
    if not names or not there.issuperset(names):
        raise ValueError(f"adapter_name: got {adapter_name!r} with {names} active, expected one of {sorted(there)}")
    return list(names), layers


def register() -> None:
    """Write the method into PEFT's tables; its own ``register_peft_method`` takes none but its own types."""
    kind = RoutedLoraType.ROUTED_LORA
    tables: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, RoutedLoraConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, RoutedLoraModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, RoutedLoraModel.prefix),
    ]
    for table, value in tables:
        if table.get(kind, value) != value:
            raise RuntimeError(
                f"peft: got a method {kind.value} that is {table[kind]!r}, expected none before this one"
            )
    for table, value in tables:
        table[kind] = value


register()
