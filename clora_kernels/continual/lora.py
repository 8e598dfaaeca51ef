"""LoRA (arXiv 2106.09685) on a sequence of tasks: the baselines of every continual-learning method."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..modules.inject import Targets
from ..modules.routed_lora import RoutedLoRALinear
from .protocol import ContinualMethod

TRAIN = ("always", "first_task", "never")


class RoutedLoRAMethod(ContinualMethod):
    """A method whose layers are RoutedLoRALinear, all made with the same options.

    Args:
        model, targets: as in :class:`ContinualMethod`.
        r, scaling, dropout_p, backend: as in :class:`clora_kernels.RoutedLoRALinear`.

    Raises:
        ValueError: an unknown option; no layer of the model matches.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        *,
        r: int = 8,
        scaling: float = 1.0,
        dropout_p: float = 0.0,
        backend: str = "auto",
    ) -> None:
        self.options: dict[str, Any] = {"r": r, "scaling": scaling, "dropout_p": dropout_p, "backend": backend}
        super().__init__(model, targets)


class SequentialLoRA(RoutedLoRAMethod):
    """One LoRA trained on task after task, and nothing done against forgetting.

    Args:
        train: "always"; "first_task": later tasks use what the first one learned; "never": the frozen model.
        model, targets, **layer: as in :class:`RoutedLoRAMethod`: r, scaling, dropout_p and backend of the layers.

    Raises:
        ValueError: an unknown option; no layer of the model matches.
    """

    def __init__(self, model: nn.Module, targets: Targets, *, train: str = "always", **layer: Any) -> None:
        if train not in TRAIN:
            raise ValueError(f"train: got {train!r}, expected one of {', '.join(TRAIN)}")
        self.train = train
        super().__init__(model, targets, **layer)

    def make_layer(self, linear: nn.Module) -> RoutedLoRALinear:
        return RoutedLoRALinear.from_linear(linear, routing=False, **self.options)

    def trainable(self) -> list[nn.Parameter]:
        learns = self.train == "always" or (self.train == "first_task" and self.task <= 1)
        return super().trainable() if learns else []
