r"""SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning, as a method of one file.

The directions that earlier tasks found stay, their magnitudes go on learning. With A_i [r, K] and B_i [N, r] of task i:

    forward     y = x·Wᵀ + s·x·(Σ_{i<t} α_i·B_i·A_i/‖B_i·A_i‖_F + B_t·A_t)ᵀ
    trained     A_t, B_t and every α_i, one a layer; the earlier pairs are frozen
    boundary    the pair of the task becomes B_t·A_t/‖B_t·A_t‖_F with a magnitude; a new one starts as LoRA does
    inference   one weight a layer; nobody needs to know the task

A layer is one routed LoRA of rank t·r: the factors of all tasks one after the other, the routing diagonal by blocks,
α_1·I, ..., α_{t−1}·I, I. Ours: the pair that learns carries its own magnitude (B_t = 0 has no direction yet), and α_t
starts at ‖B_t·A_t‖_F when it is frozen, so that the model's outputs do not change. Memory grows by a pair a task.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clora_kernels import RoutedLoRALinear
from clora_kernels.continual import RoutedLoRAMethod, low_rank_norm


class SDLoRALinear(RoutedLoRALinear):
    """A live pair beside frozen ones, ``past``: A ``[t·r, K]`` and B ``[N, t·r]`` of unit products, each with its entry
    of ``magnitudes``."""

    magnitudes: nn.Parameter
    past: tuple[Tensor, Tensor] | None = None

    def adapter_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if self.past is None:
            return self.lora_A, self.lora_B, None, None
        past_A, past_B = (t.to(self.lora_A) for t in self.past)  # the model may have moved
        alphas = self.magnitudes[: len(past_A) // self.r]
        routing = torch.cat([alphas, alphas.new_ones(1)]).repeat_interleave(self.r).diag()
        return torch.cat([past_A, self.lora_A]), torch.cat([past_B, self.lora_B], 1), routing, None

    def reset_adapter(self) -> None:
        super().reset_adapter()
        self.past = None


class SDLoRA(RoutedLoRAMethod):
    """SD-LoRA on the targets of a model; see the module's docstring.

    Args:
        tasks: the most tasks there can be: the magnitudes are parameters of a size that does not change.
        model, targets, **layer: as in RoutedLoRAMethod: r, scaling, dropout_p and backend of the layers.

    Reports, a task: ``share``, the magnitude of the task's own pair over that of all, Σ_layers n_t/Σ_layers Σ_i |α_i|;
    None while all are zero.

    Raises:
        ValueError: fewer tasks than one, an unknown option; no layer of the model matches. A task beyond ``tasks``,
            when it begins.
    """

    def __init__(self, model: nn.Module, targets: Any, *, tasks: int, **layer: Any) -> None:
        if not isinstance(tasks, int) or tasks < 1:
            raise ValueError(f"tasks: got {tasks!r}, expected the most tasks there can be, an int of at least 1")
        self.tasks = tasks
        super().__init__(model, targets, **layer)

    def make_layer(self, linear: nn.Module) -> SDLoRALinear:
        layer = SDLoRALinear.from_linear(linear, routing=False, **self.options)
        layer.magnitudes = nn.Parameter(layer.lora_A.new_zeros(self.tasks))
        return layer

    def trainable(self) -> list[nn.Parameter]:
        """In the first task there is no magnitude to learn yet."""
        return [p for layer in self.layers.values() for p in layer.adapter_parameters()
                if self.task > 1 or p is not layer.magnitudes]  # fmt: skip

    def on_task_start(self) -> None:
        if self.task > self.tasks:
            raise ValueError(f"tasks: got task {self.task}, expected at most the {self.tasks} that were announced")

    def on_task_end(self) -> dict[str, float | None]:
        """Freeze the direction of every pair, give it its magnitude, and start a new pair."""
        new = whole = 0.0
        for name, layer in self.layers.items():
            A, B = layer.lora_A.detach(), layer.lora_B.detach()
            norm = low_rank_norm(B, A.mT)
            layer.magnitudes[self.task - 1] = norm
            B = B / norm.to(B).clamp(min=torch.finfo(B.dtype).tiny)  # a pair that learned nothing stays zero
            self.kept |= {f"past.{self.task}.{name}.lora_A": A.clone(), f"past.{self.task}.{name}.lora_B": B}
            new, whole = new + float(norm), whole + float(layer.magnitudes.abs().sum())
            layer.reset_adapter()
        self._bring(self.task)
        return {"share": new / whole if whole else None}

    def kept_shapes(self, finished: int, in_task: bool) -> dict[str, torch.Size]:
        return self.adapter_shapes(*(f"past.{task}" for task in range(1, finished + 1)))

    def on_load(self) -> None:
        self._bring(self.task - 1 if self.in_task else self.task)

    def _bring(self, tasks: int) -> None:
        """Give every layer its pairs of the first ``tasks`` tasks."""
        for name, layer in self.layers.items():
            earlier = [f"past.{i}.{name}.lora_" for i in range(1, tasks + 1)]
            A, B = ([self.kept[key + x].to(layer.lora_A) for key in earlier] for x in "AB")
            layer.past = (torch.cat(A), torch.cat(B, 1)) if tasks else None
