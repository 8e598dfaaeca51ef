r"""CL-LoRA: Continual Low-Rank Adaptation for Rehearsal-Free Class-Incremental Learning (CVPR 2025).

A LoRA on the q and v projections of every block, y = W·x + μ·B·A·x, where A [r, K] (``lora_A``) goes down, B [N, r]
(``lora_B``) up (their code names them the other way round):

    shared        the first half of the blocks: one adapter for all tasks, μ = 1; B learns, A never does
    specific      the other half: A, B and the block weight μ, all new in each task
    start         A = Qᵀ of the QR of a matrix of U[0, 1); B = 0; μ from U(0.5, 1.5)
    boundary      the specific A, B and μ are kept; the shared B become those of the teacher
    inference     for each task i so far: the latest shared adapters with A, B and μ of task i, whose features count for
                  the classes of task i

Each batch, from the second task on, makes two steps of the one optimizer; h is the task's head, f(x) what the shared
blocks put out (the forward ends there) through the model's last norm, its first token:

    distillation  5·CE(softmax(h(f_old(x))/2), softmax(h(f(x))/2)), f_old with the teacher's B; h learns through both.
                  Row j of the gradient of every shared B is weighed by N·‖B_old[j,:]‖ / Σ_j ‖B_old[j,:]‖; of all
                  adapters the shared B alone have a gradient, so nothing else moves, by momentum or decay either
    task          CE over the task's classes + 1e-4·mean over earlier tasks i of |cos(μ_t, μ_i)|, μ_t all the block
                  weights of task t; everything moves

Their μ holds a weight for the k projections too, which nothing uses: it counts in the cosine and decays; here these
are ``own["idle_weights"]``. They train by SGD with momentum 0.9 and a rate that falls to zero along a cosine, both new
in each task. Not published: a B_old that is all zero weighs every row 1 here, and the teacher runs in the mode of the
student (dropout in the model draws for each of the two).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..autograd.gram_schmidt import gram_schmidt
from ..modules.adapter import AdapterLinear
from ..modules.inject import Targets, inject
from ..modules.routed_lora import RoutedLoRALinear
from .attached import Adapters
from .blocks import blocks_with, computed_once, output_of
from .losses import block_weight_penalty, check_number, check_weight, relative_norm, soft_cross_entropy
from .protocol import ContinualMethod
from .vit import class_token_exit, vit_targets

Q_AND_V = vit_targets(("q", "v"))


class CLLoRA(ContinualMethod):
    """CL-LoRA on the targets of a model; see the module's docstring and :class:`ContinualMethod`.

    The blocks are the children of the nn.ModuleList or nn.Sequential that holds the targets, those without a target
    left out; the first half of them (rounded down) is shared. ``begin_task`` needs the task's head from the second task
    on, and ``views()`` are the tasks begun so far, of which the one that runs is tested as it is. A model that is
    compiled is left early, and tested, uncompiled.

    Args:
        model, targets: as in :class:`ContinualMethod`.
        r: the adapters' rank, at most the in_features of each target.
        distillation: weight of the distillation; 0: no such step.
        temperature: that of both its branches; their loss is not multiplied by its square.
        reassignment: whether the rows of its gradients are weighed.
        weight_penalty: weight of the cosines of block weights; 0: none.
        idle_weights: how many weights that nothing uses a specific block has.
        exit: ``exit(model, hidden)``: what the head gets, of the hidden states after the last shared block.
        backend: as in :class:`clora_kernels.RoutedLoRALinear`.

    Reports, a task: ``drift``, ‖B·A − B_old·A‖/‖B_old·A‖ over the shared layers, B_old the teacher's: how far what all
    tasks share moved; ``overlap``, the mean |cos(μ_t, μ_i)| over earlier tasks. Both are None in the first task.

    Attributes:
        shared, specific: the layers of either kind by name.
        shared_blocks, specific_blocks: the names of the blocks they are in.

    Raises:
        ValueError: a number out of range; no layer of the model matches; targets in fewer than two blocks or outside of
            the children of one nn.ModuleList or nn.Sequential.
        TypeError: a number that is none; ``reassignment`` that is no bool, ``exit`` that cannot be called.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets = Q_AND_V,
        *,
        r: int = 8,
        distillation: float = 5.0,
        temperature: float = 2.0,
        reassignment: bool = True,
        weight_penalty: float = 1e-4,
        idle_weights: int = 1,
        exit: Callable[[nn.Module, Tensor], Tensor] = class_token_exit,
        backend: str = "auto",
    ) -> None:
        check_weight("distillation", distillation)
        check_weight("weight_penalty", weight_penalty)
        check_number("temperature", temperature)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: got {temperature!r}, expected a finite number above 0")
        if isinstance(idle_weights, bool) or not isinstance(idle_weights, int) or idle_weights < 0:
            raise ValueError(f"idle_weights: got {idle_weights!r}, expected a number of weights, an int of at least 0")
        if not isinstance(reassignment, bool):
            raise TypeError(f"reassignment: got {reassignment!r}, expected True or False")
        if not callable(exit):
            raise TypeError(f"exit: got {exit!r}, expected a function of the model and its hidden states")
        self.distillation, self.temperature, self.reassignment = distillation, temperature, reassignment
        self.weight_penalty, self.exit = weight_penalty, exit
        self.options: dict[str, Any] = {"r": r, "backend": backend}
        super().__init__(model, targets)
        first = next(iter(self.specific.values()))
        if idle_weights:
            self.own["idle_weights"] = nn.Parameter(first.lora_B.new_ones(len(self.specific_blocks), idle_weights))

    def attach(self, targets: Targets) -> dict[str, AdapterLinear]:
        # Layers that are swapped for themselves: what the targets name is known before anything changes.
        names = inject(self.model, lambda linear: linear, targets).swapped
        blocks = blocks_with(self.model, names)
        if len(blocks) < 2:
            raise ValueError(f"targets: got layers of {blocks[0]} alone, expected those of at least 2 blocks")
        self.shared_blocks, self.specific_blocks = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
        layers = super().attach(targets)
        routed = {name: cast(RoutedLoRALinear, layer) for name, layer in layers.items()}
        shared = tuple(f"{block}." for block in self.shared_blocks)
        self.shared = {name: layer for name, layer in routed.items() if f"{name}.".startswith(shared)}
        self.specific = {name: layer for name, layer in routed.items() if name not in self.shared}
        for layer in self.specific.values():
            layer.scaling = nn.Parameter(layer.lora_B.new_ones(()))
        return layers

    def make_layer(self, linear: nn.Module) -> RoutedLoRALinear:
        """A drawn orthonormal, B = 0; later, in a specific block, a ``scaling`` that learns."""
        layer = RoutedLoRALinear.from_linear(linear, routing=False, **self.options)
        if layer.r > layer.in_features:
            raise ValueError(f"r: got {layer.r}, expected at most the in_features of every target, {layer.in_features}")
        self._draw(layer)
        return layer

    @torch.no_grad()
    def _draw(self, layer: RoutedLoRALinear) -> None:
        layer.lora_A.copy_(gram_schmidt(torch.rand_like(layer.lora_A.mT)).Q.mT)
        layer.lora_B.zero_()
        if isinstance(layer.scaling, nn.Parameter):
            layer.scaling.uniform_(0.5, 1.5)

    def on_task_start(self) -> None:
        """Draw the specific adapters and all block weights anew."""
        for layer in self.specific.values():
            self._draw(layer)
        for idle in self.own.values():
            idle.uniform_(0.5, 1.5)

    def trainable(self) -> list[nn.Parameter]:
        specific = (p for layer in self.specific.values() for p in layer.adapter_parameters())
        return [*(layer.lora_B for layer in self.shared.values()), *specific, *self.own.values()]

    def block_weights(self) -> Tensor:
        """μ of the task as one vector: the scaling of every specific layer, then the idle weights."""
        weights = [cast(Tensor, layer.scaling).reshape(1) for layer in self.specific.values()]
        return torch.cat([w.to(weights[0].device) for w in (*weights, *(p.flatten() for p in self.own.values()))])

    # Distillation

    def shared_features(self, inputs: Any) -> Tensor:
        """What the head gets in the distillation: the model up to its last shared block, then ``exit``."""
        last = self.model.get_submodule(self.shared_blocks[-1])
        return self.exit(self.model, output_of(last, lambda: self.run(inputs)))

    def teacher(self) -> Adapters:
        """The shared B as the previous task left them, by layer."""
        return {name: {"lora_B": self.kept[f"teacher.{name}.lora_B"]} for name in self.shared}

    def extra_steps(self, inputs: Any) -> Iterator[tuple[str, Tensor]]:
        """The distillation, from the second task on.

        Raises:
            RuntimeError: there is no head.
        """
        if self.task < 2 or self.distillation == 0:
            return
        if self.head is None:
            raise RuntimeError(
                f"head: got None in task {self.task}, expected begin_task(head), or after loading method.head = head: "
                "the distillation goes through it"
            )
        student = self.head(self.shared_features(inputs))
        with torch.no_grad(), self.with_adapters(self.teacher()):
            features = self.shared_features(inputs)
        loss = soft_cross_entropy(student, self.head(features), self.temperature)
        yield "distillation", self.distillation * loss

    def adjust_gradients(self, step: str) -> None:
        if step == "task":
            # Part of a larger parameter in their code, whose gradient is zero there: weight decay moves them.
            for idle in self.own.values():
                idle.grad = torch.zeros_like(idle) if idle.grad is None else idle.grad
        elif self.reassignment:
            for name, layer in self.shared.items():
                if (grad := layer.lora_B.grad) is not None:
                    grad *= row_weights(self.kept[f"teacher.{name}.lora_B"]).to(grad)[:, None]

    def extra_losses(self) -> dict[str, Tensor]:
        """The cosines of the block weights with those of earlier tasks; none in the first task."""
        if self.task < 2 or self.weight_penalty == 0:
            return {}
        penalty = block_weight_penalty(self.block_weights(), self._old_block_weights())
        return {"block_weights": self.weight_penalty * penalty}

    # Boundary and inference

    def on_task_end(self) -> dict[str, float | None]:
        """Keep what is the task's own; the shared B become the teacher's."""
        measures = {"drift": self._drift(), "overlap": self._overlap()}
        for name, layer in self.shared.items():
            self.kept[f"teacher.{name}.lora_B"] = layer.lora_B.detach().clone()
        for name, layer in self.specific.items():
            self.kept[f"task.{self.task}.{name}.lora_A"] = layer.lora_A.detach().clone()
            self.kept[f"task.{self.task}.{name}.lora_B"] = layer.lora_B.detach().clone()
        self.kept[f"task.{self.task}.block_weights"] = self.block_weights().detach().clone()
        return measures

    def _drift(self) -> float | None:
        if self.task < 2:
            return None
        teacher = {name: self.kept[f"teacher.{name}.lora_B"].to(layer.lora_B) for name, layer in self.shared.items()}
        return relative_norm(
            ((layer.lora_B - teacher[name], layer.lora_A.mT), (teacher[name], layer.lora_A.mT))
            for name, layer in self.shared.items()
        )

    def _overlap(self) -> float | None:
        return float(block_weight_penalty(self.block_weights(), self._old_block_weights())) if self.task > 1 else None

    def _old_block_weights(self) -> Tensor:
        """[task − 1, n]."""
        here = next(iter(self.specific.values())).lora_B
        return torch.stack([self.kept[f"task.{i}.block_weights"].to(here) for i in range(1, self.task)])

    def kept_shapes(self, finished: int, in_task: bool) -> dict[str, torch.Size]:
        """The teacher's B and what each finished task had of its own."""
        tasks, weights = [f"task.{i}" for i in range(1, finished + 1)], self.block_weights().shape
        teacher = self.adapter_shapes("teacher", tensors=["lora_B"], layers=self.shared) if finished else {}
        own = self.adapter_shapes(*tasks, layers=self.specific)
        return teacher | own | {f"{task}.block_weights": weights for task in tasks}

    def views(self) -> list[int | None]:
        """The tasks begun so far."""
        return list(range(1, self.task + 1))

    def tested_adapters(self, view: int | None) -> Adapters:
        """The specific adapters of that task; of the one begun last those that are in the layers."""
        if view == self.task:
            return {}
        weights = self.kept[f"task.{view}.block_weights"]
        return {
            name: {
                "lora_A": self.kept[f"task.{view}.{name}.lora_A"],
                "lora_B": self.kept[f"task.{view}.{name}.lora_B"],
                "scaling": weights[i],
            }
            for i, name in enumerate(self.specific)
        }

    @torch.no_grad()
    def outputs(self, inputs: Any) -> list[Any]:
        """As :meth:`ContinualMethod.outputs`, to the bit; the shared blocks, the same in every view, run once. What the
        model collects from within them by hooks, as transformers' attentions, is in the first view alone."""
        with computed_once(self.model, [self.model.get_submodule(block) for block in self.shared_blocks]):
            return super().outputs(inputs)


def row_weights(old: Tensor) -> Tensor:
    """[N]: N·‖old[j,:]‖ / Σ_j ‖old[j,:]‖ of ``old [N, r]``, which has mean 1; all 1 where ``old`` is zero."""
    norms = torch.linalg.vector_norm(old, dim=1)
    total = norms.sum()
    return torch.where(total > 0, len(norms) * norms / total, torch.ones_like(norms))
