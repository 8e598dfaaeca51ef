r"""O-LoRA: Orthogonal Subspace Learning for Language Model Continual Learning, as a method of one file.

Every task i has a LoRA of its own, ΔW_i = s·B_i·A_i with A_i [r, K] and B_i [N, r]; the earlier ones are frozen:

    forward     y = x·(W + s·Σ_{i<t} B_i·A_i)ᵀ + s·x·A_tᵀ·B_tᵀ
    loss        the task's + λ·Σ_layers Σ_{i<t} Σ_jk |A_t·A_iᵀ|_jk       λ = 0.5
    boundary    W ← W + s·B_t·A_t; a new pair starts as LoRA does, so the model's outputs do not change
    inference   one weight a layer; nobody needs to know the task

Ours: earlier pairs are folded into W at once, not when all tasks are over, which computes the same function and costs
nothing (below fp32 each fold rounds W); what is kept of them is their A for the loss and, as the frozen weights are not
saved, their B to fold again when a run is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clora_kernels import RoutedLoRALinear
from clora_kernels.continual import RoutedLoRAMethod, check_weight, pairwise_overlap


class OLoRA(RoutedLoRAMethod):
    """O-LoRA on the targets of a model; see the module's docstring.

    Args:
        orthogonality: λ.
        model, targets, **layer: as in RoutedLoRAMethod: r, scaling, dropout_p and backend of the layers.

    Reports, a task: ``overlap``, the loss without its weight as the task leaves it; None in the first.

    Raises:
        ValueError: a λ below 0 or not finite, an unknown option; no layer of the model matches.
    """

    def __init__(self, model: nn.Module, targets: Any, *, orthogonality: float = 0.5, **layer: Any) -> None:
        check_weight("orthogonality", orthogonality)
        self.orthogonality = orthogonality
        self.old: dict[str, Tensor] = {}
        super().__init__(model, targets, **layer)

    def make_layer(self, linear: nn.Module) -> RoutedLoRALinear:
        return RoutedLoRALinear.from_linear(linear, routing=False, **self.options)

    def on_task_start(self) -> None:
        """Put the rows of all earlier A of a layer together, [(t − 1)·r, K]."""
        earlier = [self.folded(task) for task in range(1, self.task)]
        self.old = {
            name: torch.cat([pairs[name]["lora_A"].to(layer.lora_A) for pairs in earlier])
            for name, layer in self.layers.items()
            if earlier
        }

    def kept_shapes(self, finished: int, in_task: bool) -> dict[str, torch.Size]:
        return self.adapter_shapes(*(f"folded.{task}" for task in range(1, finished + 1)))

    def on_load(self) -> None:
        self.on_task_start()

    def overlap(self) -> Tensor:
        """Σ_layers Σ_{i<t} Σ_jk |A_t·A_iᵀ|_jk, 0-dim; for a second task or a later one."""
        device, new = next(self.parameters()).device, {name: layer.lora_A for name, layer in self.layers.items()}
        overlaps = [pairwise_overlap(new[name], old.to(new[name])) for name, old in self.old.items()]
        return torch.stack([o.to(device) for o in overlaps]).sum()

    def extra_losses(self) -> dict[str, Tensor]:
        return {"orthogonality": self.orthogonality * self.overlap()} if self.old and self.orthogonality else {}

    def on_task_end(self) -> dict[str, float | None]:
        """Fold the pairs into the weights; loading folds them again."""
        measures = {"overlap": float(self.overlap()) if self.old else None}
        self.fold_layers(self.task)
        return measures
