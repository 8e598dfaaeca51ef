"""Classifiers for tasks that bring their own classes: a cosine head to train with, class means to test with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Module):
    """logits = scale · cos(feature, weight_c), with a learned scale.

    Args:
        in_features, classes: sizes; ``weight`` is ``[classes, in_features]``.
        scale: what the learned scale starts from.
    """

    def __init__(self, in_features: int, classes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, in_features))
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="linear")

    def forward(self, features: Tensor) -> Tensor:
        """[..., classes] for features [..., in_features]."""
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))


class Prototypes:
    """Class means of the features, taken once at the end of each task and never again; a test sample goes to the
    nearest by cosine among the classes of all tasks so far.

    ``features`` is one tensor ``[S, d]``, or, where every task has its own view of a sample, a sequence of them, one a
    task.
    """

    def __init__(self) -> None:
        self.classes: list[Tensor] = []
        self.means: list[Tensor] = []

    def add_task(self, features: Tensor, labels: Tensor) -> None:
        """Add the classes found in ``labels [S]`` with the means of ``features [S, d]``.

        Raises:
            ValueError: a class that an earlier task brought; sizes that differ; no samples.
        """
        if labels.numel() == 0 or features.shape[:1] != labels.shape:
            raise ValueError(
                f"labels: got {tuple(labels.shape)}, expected one each of features {tuple(features.shape)}"
            )
        classes = labels.unique()
        known = set(classes.tolist()) & {c for task in self.classes for c in task.tolist()}
        if known:
            raise ValueError(f"labels: got the classes {sorted(known)} of an earlier task, expected new ones")
        self.classes.append(classes)
        self.means.append(torch.stack([features[labels == c].mean(0) for c in classes]))

    def predict(self, features: Tensor | Sequence[Tensor], task: int | None = None) -> Tensor:
        """[S]: the predicted class of each sample, among the classes of task ``task`` alone (from 1) or of all.

        Raises:
            ValueError: no task yet, a task that is not there, or another number of views than tasks.
        """
        tasks = range(len(self.means)) if task is None else [task - 1]
        if not self.means or not 0 <= tasks[0] < len(self.means):
            raise ValueError(f"task: got {task!r}, expected one of the {len(self.means)} added so far, or None")
        views = [features] * len(self.means) if isinstance(features, Tensor) else features
        if len(views) != len(self.means):
            raise ValueError(f"features: got {len(views)} views, expected one for each of {len(self.means)} tasks")
        # Loaded ones are on the CPU, whatever device the features are on.
        means = [self.means[t].to(views[t].device) for t in tasks]
        cosines = [F.normalize(views[t], dim=-1) @ F.normalize(m, dim=-1).mT for t, m in zip(tasks, means, strict=True)]
        best = torch.cat(cosines, 1).argmax(1)
        return torch.cat([self.classes[t].to(best.device) for t in tasks])[best]

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Classes and means, a tensor each a task."""
        return {"classes": list(self.classes), "means": list(self.means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the classes and means of a ``state_dict`` in place of those that are there."""
        self.classes, self.means = list(state["classes"]), list(state["means"])
