r"""DAC: a pool of rank-1 experts in a single LoRA (arXiv 2601.22828).

A is r×K, B is N×r; expert i is the pair (A[i, :], B[:, i]). A router, a linear layer from K to r, chooses among them:

    c             the first token of each sample ([CLS]; a sample without tokens is its own)
    choice        the k experts of highest softmax(router(drop(c))), a sample; of equal ones the lowest indices
    counts        how often each expert was chosen in the batch; summed over the task: ``activation_counts``
    gate          m = the k experts of the highest counts in the batch, one mask for all samples
    forward       y = x·Wᵀ + b + s·((drop(x)·Aᵀ) ⊙ m)·Bᵀ,  s = 1/r, dropout 0.2; both see the same drop(x)
    loss          the task's + 0.1·AGO,  AGO = the mean over layers of Σ|B[:, T]ᵀ·B_old|,
                  T = the ``keep`` experts of the highest ``activation_counts``, B_old = the B of all earlier tasks
    boundary      W ← W + s·B[:, T]·A[T, :]; A, B, router and counts start anew
    inference     the plain model; within a task with W + s·B[:, T]·A[T, :]

This is what the authors' released code computes: of the experts that a batch selected each weighs 1, so no gradient
reaches the router, which stays as it was drawn for the task. The paper's abstract speaks of a composition by sample, of
which nothing else is published; here ``selection="sample"`` gives each sample the mask of its own choice, and
``weights="probability"`` weighs the selected by the sample's softmax over all r experts, from which the router learns
(what is kept weighs 1 in the weight all the same). Released settings: AdamW, rate 2e-3, weight decay 1e-2, cosine to
1e-6, 500 steps of 32 samples, the linear layers q, k, v, out, fc1, fc2 of every block of CLIP ViT-B/16; the task's loss
is CLIP's contrastive one there. Here it is whatever is given to ``training_step``: with the cross-entropy of a head, as
in the comparisons of this package, DAC is a reconstruction.

The absolute value has no derivative at 0: there the subgradient 0 counts, so a B that is still zero learns from the
task alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..modules.inject import Targets
from ..modules.rank1_experts.arguments import check_name
from ..modules.rank1_experts.choosing import top_experts
from .dac_layer import DACLinear
from .losses import ago as ago_loss
from .losses import check_weight
from .protocol import ContinualMethod

REMEMBER = ("all", "kept")
FOLDED = ("lora_A", "lora_B", "activation_counts")  # what a fold depends on


class DAC(ContinualMethod):
    """DAC on the targets of a model; see the module's docstring and :class:`ContinualMethod`.

    Args:
        model, targets: as in :class:`ContinualMethod`.
        r, k, keep: experts of a task's pool in each layer, of which each sample chooses k and the task leaves ``keep``.
        scaling: s; None: 1/r.
        dropout_p: dropout on the input of experts and router while training.
        ago: the weight of the loss.
        remember: B_old: "all" columns of the earlier tasks' B, or those that the tasks "kept", which alone are in W.
        selection: "batch": the experts that the batch chose most often serve all its samples; "sample": each sample has
            those it chose.
        weights: of the selected experts: "unit", and the router does not learn; "probability", and it does.
        operation: "routed_lora", one product with the whole pool and a gate; "rank1_experts", expert by expert, for
            pools too large for that (the batch's choice is then each sample's).
        backend: of that operation, as :func:`clora_kernels.routed_lora_linear` or
            :func:`clora_kernels.rank1_experts` takes it.

    Reports, a task: ``overlap``, AGO without its weight (None in the first task); ``share``, the part of all choices
    that fell on the experts which are kept (None if there were none). No drift: what earlier tasks left in W stays in
    it as it is. What is stored grows by A, B and the counts of each task; the model does not.

    Raises:
        ValueError, TypeError: an unknown option, a number out of range; no layer of the model matches.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        *,
        r: int = 12,
        k: int = 8,
        keep: int = 4,
        scaling: float | None = None,
        dropout_p: float = 0.2,
        ago: float = 0.1,
        remember: str = "all",
        selection: str = "batch",
        weights: str = "unit",
        operation: str = "routed_lora",
        backend: str = "auto",
    ) -> None:
        check_weight("ago", ago)
        check_name("remember", remember, REMEMBER)
        self.ago, self.remember = ago, remember
        self.options: dict[str, Any] = {
            "r": r,
            "k": k,
            "keep": keep,
            "scaling": scaling,
            "dropout_p": dropout_p,
            "backend": backend,
        }
        self.options |= {"selection": selection, "weights": weights, "operation": operation}
        self._old: dict[str, Tensor] = {}
        super().__init__(model, targets)

    def make_layer(self, linear: nn.Module) -> DACLinear:
        return DACLinear.from_linear(linear, **self.options)

    def pools(self) -> Iterator[tuple[str, DACLinear]]:
        """The layers by name, as what ``make_layer`` made them."""
        return ((name, cast(DACLinear, layer)) for name, layer in self.layers.items())

    def trainable(self) -> list[nn.Parameter]:
        """A and B, and the router where the weights of the experts let it learn."""
        if self.options["weights"] == "probability":
            return super().trainable()
        return [p for _, layer in self.pools() for p in (layer.lora_A, layer.lora_B)]

    def on_task_start(self) -> None:
        """Count from zero, whatever ran between the tasks; gather B_old."""
        for _, layer in self.pools():
            layer.activation_counts.zero_()
        self._gather()

    def kept_shapes(self, finished: int, in_task: bool) -> dict[str, torch.Size]:
        """A, B and counts of every finished task."""
        return self.adapter_shapes(*(f"folded.{task}" for task in range(1, finished + 1)), tensors=FOLDED)

    def on_load(self) -> None:
        self._gather()

    def _gather(self) -> None:
        earlier = range(1, self.task)
        self._old = {
            name: torch.cat([self._left(t, name).to(layer.lora_B) for t in earlier], 1)
            for name, layer in self.pools()
            if earlier
        }

    def _left(self, task: int, name: str) -> Tensor:
        """What B_old holds of an earlier task's B."""
        B, counts = (self.kept[f"folded.{task}.{name}.{tensor}"] for tensor in ("lora_B", "activation_counts"))
        return B if self.remember == "all" else B.index_select(1, top_experts(counts, self.options["keep"]))

    def extra_losses(self) -> dict[str, Tensor]:
        """The weighted AGO; none in the first task."""
        return {"ago": self.ago * self._overlap()} if self._old and self.ago else {}

    def _overlap(self) -> Tensor:
        """The mean over layers of Σ|B[:, T]ᵀ·B_old|; what the batch chose counts in T already."""
        kept = [layer.lora_B.index_select(1, layer.kept()) for _, layer in self.pools()]
        return ago_loss(kept, [self._old[name].to(layer.lora_B) for name, layer in self.pools()])

    def on_task_end(self) -> dict[str, float | None]:
        """W ← W + s·B[:, T]·A[T, :]; A, B, router and counts anew."""
        measures = {"overlap": float(self._overlap()) if self._old else None, "share": self._share()}
        self.fold_layers(self.task, FOLDED)
        return measures

    def _share(self) -> float | None:
        all_choices = sum(int(layer.activation_counts.sum()) for _, layer in self.pools())
        on_kept = sum(int(layer.activation_counts[layer.kept()].sum()) for _, layer in self.pools())
        return on_kept / all_choices if all_choices else None
