r"""C-LoRA: Continual Low-Rank Adaptation for Pre-trained Models (arXiv 2502.17920).

One adapter for all tasks, ΔW = s·A·(R_old + R_δ)·B with A [K, r], B [r, N] and a routing matrix R [r, r] between them:

    forward       y = x·W + s·x·A·(R_old + R_δ)·B                                     (eq. 4-5)
    gradients     R_old carries the earlier tasks: it counts in y and dx, while A and B learn through R_δ alone
                  (eq. 11-17); ``frozen_routing`` and ``routing`` of ``routed_lora_linear``
    loss          the task's + λ·Σ_layers ‖Q_oldᵀ·R_δ‖²_F, Q_old a basis of what R_old uses     (eq. 26)
    boundary      R_old ← R_old + R_δ, R_δ ← 0: the model's outputs do not change
    inference     one weight W + s·A·R_old·B a layer; nobody needs to know the task

The paper leaves the start, Q_old, λ and the optimizer open. Here, by default: R_old = R_δ = 0, A Kaiming, B normal with
standard deviation 1/√r (ΔW = 0 all the same; starting from R_δ = I would fill R_old's rank at once and turn the loss
into a plain ridge); Q_old the leading left singular vectors of R_old that hold 90 % of ‖R_old‖²_F; λ = 1; SGD with
momentum 0.9 (an adaptive optimizer rescales the small gradients of A and B to full steps, and A·R_old·B rides on them).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..autograd.gram_schmidt import orthonormal_basis
from ..modules.inject import Targets
from ..modules.routed_lora import RoutedLoRALinear
from .lora import RoutedLoRAMethod
from .losses import check_fraction, check_weight, leading_left_singular_vectors, relative_norm, routing_orthogonality

BASES = ("leading", "full", "raw")
TRAIN_FACTORS = ("always", "first_task")


class CLoRA(RoutedLoRAMethod):
    """C-LoRA on the targets of a model; see the module's docstring and :class:`ContinualMethod`.

    Args:
        model, targets, **layer: as in :class:`RoutedLoRAMethod`: r, scaling, dropout_p and backend of the layers.
        orthogonality: λ.
        basis: Q_old: "leading", the leading left singular vectors of R_old that hold ``energy`` of its squared norm;
            "full", an orthonormal basis of R_old's column space, as :func:`clora_kernels.orthonormal_basis` makes it (a
            column counts where it is independent of those before it, however short it is); "raw", R_old itself.
        energy: see ``basis``.
        train_factors: "always", or "first_task": A and B stay as the first task leaves them, later tasks train R_δ.

    Reports, a task: ``drift``, ‖A·R_old·B − A′·R_old·B′‖/‖A·R_old·B‖ over all layers with A, B before and A′, B′ after
    the task: how far the earlier tasks' path moved; ``overlap``, Σ‖Qᵀ·R_δ‖²/Σ‖R_δ‖² with the "leading" Q: how much of
    the new routing lies where the old one is. Both are None while R_old is zero.

    Raises:
        ValueError: an unknown option, a number out of range; no layer of the model matches.
        TypeError: an ``orthogonality`` or ``energy`` that is no number.
    """

    layer_type = RoutedLoRALinear

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        *,
        orthogonality: float = 1.0,
        basis: str = "leading",
        energy: float = 0.9,
        train_factors: str = "always",
        **layer: Any,
    ) -> None:
        for name, value, known in (("basis", basis, BASES), ("train_factors", train_factors, TRAIN_FACTORS)):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        check_weight("orthogonality", orthogonality)
        check_fraction("energy", energy)
        self.orthogonality, self.basis, self.energy = orthogonality, basis, energy
        self.train_factors = train_factors
        super().__init__(model, targets, **layer)

    def make_layer(self, linear: nn.Module) -> RoutedLoRALinear:
        """Both routings zero, A Kaiming, B normal: ΔW = 0, and the first gradient of R_δ is not."""
        layer = self.layer_type.from_linear(linear, routing=True, frozen_routing=True, **self.options)
        nn.init.normal_(layer.lora_B, std=1 / math.sqrt(layer.r))
        nn.init.zeros_(layer.get_parameter("routing"))
        return layer

    def routed(self) -> Iterator[tuple[str, RoutedLoRALinear]]:
        """The layers by name, as what ``make_layer`` made them."""
        return ((name, cast(RoutedLoRALinear, layer)) for name, layer in self.layers.items())

    def factors(self) -> list[nn.Parameter]:
        """lora_A and lora_B of every layer."""
        return [p for _, layer in self.routed() for p in (layer.lora_A, layer.lora_B)]

    def routings(self) -> list[nn.Parameter]:
        """R_δ of every layer."""
        return [layer.get_parameter("routing") for _, layer in self.routed()]

    def old_routings(self) -> list[Tensor]:
        """R_old of every layer."""
        return [layer.get_buffer("frozen_routing") for _, layer in self.routed()]

    def trainable(self) -> list[nn.Parameter]:
        learn_factors = self.train_factors == "always" or self.task <= 1
        return [*(self.factors() if learn_factors else []), *self.routings()]

    def param_groups(self, lr: float, lr_routing: float | None = None) -> list[dict[str, Any]]:
        """A and B at ``lr`` (empty when they no longer learn), R_δ at ``lr_routing``, the same if None."""
        routings = self.routings()
        learning = {id(p) for p in self.trainable()}
        factors = [p for p in self.factors() if id(p) in learning]
        groups = [{"params": factors, "lr": lr}, {"params": routings, "lr": lr if lr_routing is None else lr_routing}]
        return [g for g in groups if g["params"]]

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn when A or B sits in an optimizer that normalises its steps (Adam and its kin)."""
        factors = {id(p) for p in self.factors()}
        # What such optimizers have among their settings and plain SGD has not.
        adaptive = [g for g in optimizer.param_groups if not {"eps", "betas", "etas"}.isdisjoint(g)]
        if any(id(p) in factors for g in adaptive for p in g["params"] if p.requires_grad):
            warnings.warn(
                f"lora_A and lora_B are trained by {type(optimizer).__name__}, which makes full steps of small "
                "gradients: the earlier tasks ride on them; take SGD with momentum or train_factors='first_task'",
                UserWarning,
                stacklevel=3,
            )

    def on_task_start(self) -> None:
        """Take Q_old, and A and B as they are for the drift; nothing in the first task."""
        if self.task == 1:
            return
        self.kept["basis"] = self._basis_of(_stacked(self.old_routings()))
        for name, layer in self.routed():
            self.kept[f"start.{name}.lora_A"] = layer.lora_A.clone()
            self.kept[f"start.{name}.lora_B"] = layer.lora_B.clone()

    def _basis_of(self, old: Tensor) -> Tensor:
        if self.basis == "raw":
            return old
        if self.basis == "full":
            return orthonormal_basis(old).Q
        return leading_left_singular_vectors(old, self.energy)

    def kept_shapes(self, finished: int, in_task: bool) -> dict[str, torch.Size]:
        """Q_old, and A and B as the task found them, within a task after the first."""
        if not (finished and in_task):
            return {}
        return {"basis": _stacked(self.old_routings()).shape, **self.adapter_shapes("start")}

    def extra_losses(self) -> dict[str, Tensor]:
        """λ·Σ_layers ‖Q_oldᵀ·R_δ‖²_F; none in the first task."""
        if self.task < 2 or self.orthogonality == 0:
            return {}
        routings = _stacked(self.routings())
        loss = routing_orthogonality(routings, self.kept["basis"].to(routings))
        return {"orthogonality": self.orthogonality * loss}

    def on_task_end(self) -> dict[str, float | None]:
        """R_old ← R_old + R_δ, R_δ ← 0."""
        measures = {"drift": self._drift(), "overlap": self._overlap()}
        for R_old, R_new in zip(self.old_routings(), self.routings(), strict=True):
            R_old += R_new
            R_new.zero_()
        self.kept.clear()
        return measures

    def _drift(self) -> float | None:
        if self.task == 1:
            return None
        return relative_norm(self._moved(name, layer) for name, layer in self.routed())

    def _moved(self, name: str, layer: RoutedLoRALinear) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The change of a layer's A·R_old·B in this task, and what it was, as products."""
        A_start, B_start = (self.kept[f"start.{name}.lora_{x}"].to(layer.lora_A) for x in "AB")
        R_old = layer.get_buffer("frozen_routing").double()
        routed, routed_start = (B.double() @ R_old.mT for B in (layer.lora_B, B_start))
        both = torch.cat([A_start, layer.lora_A]).mT
        return (both, torch.cat([routed_start, -routed], 1)), (A_start.mT, routed_start)

    def _overlap(self) -> float | None:
        routing, old = _stacked(self.routings()), _stacked(self.old_routings())
        if self.task == 1 or not old.any():
            return None
        inside = routing_orthogonality(routing, leading_left_singular_vectors(old, self.energy))
        return float(inside / routing.square().sum().clamp(min=torch.finfo(routing.dtype).tiny))


def _stacked(routings: list[Any]) -> Tensor:
    """[layers, r, r] on the first one's device."""
    return torch.cat([R.to(routings[0].device).reshape(-1, *R.shape[-2:]) for R in routings])
