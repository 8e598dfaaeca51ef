"""Pictures of a comparison: accuracy over tasks, and forgetting against learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .extras import require
from .metrics import TaskAccuracies, accuracy_over_tasks, summaries


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    require("matplotlib")
    # The figure class itself, not pyplot: no global state and no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def plot_accuracy_over_tasks(results: Mapping[str, Sequence[TaskAccuracies]], path: str | Path) -> Path:
    """PNG of the accuracy over all classes seen, after each task: mean over the runs, the band is its standard error.

    Raises:
        ImportError: without matplotlib.
        ValueError: a method without runs.
    """
    figure, axes = _axes("Accuracy on all tasks seen so far", "tasks learned", "accuracy, %")
    for method, runs in results.items():
        if not runs:
            raise ValueError(f"results[{method!r}]: got no runs, expected at least one")
        curves = 100 * torch.stack([accuracy_over_tasks(run) for run in runs])
        mean, tasks = curves.mean(0), list(range(1, curves.shape[1] + 1))
        (line,) = axes.plot(tasks, mean.tolist(), marker="o", label=method)
        if len(runs) > 1:
            se = curves.std(0) / len(runs) ** 0.5
            axes.fill_between(tasks, (mean - se).tolist(), (mean + se).tolist(), color=line.get_color(), alpha=0.15)
        axes.set_xticks(tasks)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    return Path(path)


def plot_forgetting_against_learning(results: Mapping[str, Sequence[TaskAccuracies]], path: str | Path) -> Path:
    """PNG with one point a method, bars are standard errors: right is more learned, up is less forgotten.

    Raises:
        ImportError: without matplotlib.
        ValueError: a method without runs.
    """
    figure, axes = _axes(
        "Less forgotten (up) against more learned (right)", "learning accuracy, %", "forgetting, points"
    )
    for method, runs in results.items():
        s = summaries(runs)
        x, y = s["learning"], s["forgetting"]
        bars = dict(xerr=100 * x.se, yerr=100 * y.se) if len(runs) > 1 else {}
        axes.errorbar(100 * x.mean, 100 * y.mean, **bars, fmt="o", capsize=3, label=method)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    return Path(path)
