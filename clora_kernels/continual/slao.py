r"""SLAO: Merge before Forget, a single LoRA by continual merging (arXiv 2512.23017).

One LoRA learns every task, ΔW = s·B·A with A [r, K] and B [N, r], and a merged pair beside it is what is tested; memory
does not grow with tasks. For task i = 1, 2, ...:

    start       i = 1: as LoRA does.  i ≥ 2, from the fine-tuned pair of task i − 1:
                A_ftᵀ = Q·R_q, diag(R_q) ≥ 0           reduced QR
                A⁰ = Qᵀ                                orthonormal rows that span the row space of A_ft
                B⁰ = B_ft                              the fine-tuned one, not the merged
    loss        the task's alone
    merge       A_m ← A_ft
                B_m ← B_m + λ(i)·(B_ft − B_m)          λ(i) = 1/√i; after task 1 merged = fine-tuned
    inference   W + s·B_m·A_m; nobody needs to know the task

A⁰ drops R_q, so the function that is trained jumps at the start of a task. Within a task the merged pair is what it
would be if the task ended now. Not published; here: a row of A_ft that depends on those before it (the paper's Q has
some orthonormal row there) is drawn anew as :func:`clora_kernels.gram_schmidt` completes a basis; pairs are merged in
the adapter's dtype, fp32 under 16-bit weights; s = 1 and no dropout, of which the paper tells neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ..autograd.gram_schmidt import gram_schmidt_foreach, orthonormal_basis
from ..modules.routed_lora import RoutedLoRALinear
from .attached import Adapters
from .lora import RoutedLoRAMethod
from .losses import relative_norm


class SLAO(RoutedLoRAMethod):
    """SLAO on the targets of a model; see the module's docstring and :class:`ContinualMethod`.

    Args:
        model, targets, **layer: as in :class:`RoutedLoRAMethod`: r, scaling, dropout_p and backend of the layers; r at
            most the in_features of every target.

    Reports, a task: ``lambda``, λ(i); ``distance``, ‖B_ft·A_ft − B_m·A_m‖/‖B_ft·A_ft‖ over all layers: how far the
    merged function is from what the task learned; None where it learned nothing, B_ft = 0; ``drift``,
    ‖B_m·A_m − B_m′·A_m′‖/‖B_m·A_m‖ with the merged pair before and after the task: how far what serves earlier tasks
    moved; ``overlap``, Σ‖A_ft·Q‖²/Σ‖A_ft‖², Q an orthonormal basis of the rows of A_m before: how much of the new rows
    lies where the old ones are. Both are None in the first task, the drift also while B_m = 0.

    Raises:
        ValueError: an unknown option; a rank above a target's in_features, which has no r orthonormal rows; no layer of
            the model matches.
    """

    def make_layer(self, linear: nn.Module) -> RoutedLoRALinear:
        layer = RoutedLoRALinear.from_linear(linear, routing=False, **self.options)
        if layer.r > layer.in_features:
            raise ValueError(
                f"r: got {layer.r} for a layer of {layer.in_features} in_features, expected at most these: a task "
                "starts from r orthonormal rows of lora_A"
            )
        return layer

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, A_ft, B_ft) of every layer."""
        for name, layer in self.layers.items():
            A, B, _, _ = cast(RoutedLoRALinear, layer).adapter_tensors()
            yield name, A.detach(), B.detach()

    def on_task_start(self) -> None:
        """A⁰ = Qᵀ and B⁰ = B_ft; the first task starts as LoRA does."""
        if self.task == 1:
            return
        factors = [A for _, A, _ in self.pairs()]
        bases = gram_schmidt_foreach([A.mT.to(factors[0].device) for A in factors], deficient="random")
        for A, basis in zip(factors, bases, strict=True):
            A.copy_(basis.Q.mT)

    def kept_shapes(self, finished: int, in_task: bool) -> dict[str, torch.Size]:
        """The merged pairs, from the end of the first task on."""
        return self.adapter_shapes("merged") if finished else {}

    def merge_weight(self) -> float:
        """λ of the task that was begun last."""
        return 1 / math.sqrt(self.task)

    def merged(self) -> dict[str, dict[str, Tensor]]:
        """A_m and B_m by layer; within a task as if it ended now, before the first the pair that is there."""
        merged = {}
        for name, A, B in self.pairs():
            A_m, B_m = self.kept.get(f"merged.{name}.lora_A", A), self.kept.get(f"merged.{name}.lora_B", B).to(B)
            if self.in_task:
                A_m, B_m = A, B_m + self.merge_weight() * (B - B_m)
            merged[name] = {"lora_A": A_m, "lora_B": B_m}
        return merged

    def tested_adapters(self, view: int | None) -> Adapters:
        """The merged pairs."""
        return self.merged()

    def on_task_end(self) -> dict[str, float | None]:
        """Merge; the fine-tuned pairs stay for the next task to start from."""
        merged = self.merged()
        measures = {"lambda": self.merge_weight(), "distance": self._distance(merged)}
        measures |= {"drift": self._drift(merged), "overlap": self._overlap()}
        self.kept |= {f"merged.{name}.{key}": t.clone() for name, pair in merged.items() for key, t in pair.items()}
        return measures

    def _distance(self, merged: Adapters) -> float | None:
        return relative_norm(((B - merged[name]["lora_B"], A.mT), (B, A.mT)) for name, A, B in self.pairs())

    def _before(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """A_m and B_m of a layer as the last task left them."""
        A, B = (self.kept[f"merged.{name}.lora_{x}"].to(like) for x in "AB")
        return A, B

    def _drift(self, merged: Adapters) -> float | None:
        if self.task < 2:
            return None
        parts = []
        for name, pair in merged.items():
            A, B = self._before(name, pair["lora_A"])
            both = torch.cat([B, -pair["lora_B"]], 1), torch.cat([A, pair["lora_A"]]).mT
            parts.append((both, (B, A.mT)))
        return relative_norm(parts)

    def _overlap(self) -> float | None:
        if self.task < 2:
            return None
        inside = whole = 0.0
        for name, A, _ in self.pairs():
            inside += float((A @ orthonormal_basis(self._before(name, A)[0].mT).Q).square().sum())
            whole += float(A.square().sum())
        return inside / whole if whole else None
