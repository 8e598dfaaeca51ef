r"""What a sequence of tasks did to a model, from its accuracy matrix, for one run and over paired runs.

With T tasks, ``a[i, j]`` is the accuracy on the test samples of task j after learning task i, predictions ranging over
the classes of all tasks seen so far (j ≤ i; NaN above the diagonal), n_j the number of those samples, and m[j] the
accuracy on task j right after learning it with predictions ranging over its own classes alone:

    last        Σ_j n_j·a[T, j] / Σ_j n_j
    average     the mean over i of Σ_{j≤i} n_j·a[i, j] / Σ_{j≤i} n_j
    forgetting  the mean over j < T of max_{j≤i<T} a[i, j] − a[T, j]        (Chaudhry et al., arXiv 1801.10112)
    bwt         the mean over j < T of a[T, j] − a[j, j]                    (Lopez-Paz and Ranzato, arXiv 1706.08840)
    learning    the mean of m[j]

A method that learns nothing forgets nothing: read forgetting beside learning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

METRICS = ("last", "average", "forgetting", "bwt", "learning")
HIGHER_IS_BETTER = {"last": True, "average": True, "forgetting": False, "bwt": True, "learning": True}


@dataclass(frozen=True)
class TaskAccuracies:
    """One run over T tasks; accuracies are fractions.

    Args:
        accuracy: a ``[T, T]``; what is above the diagonal is ignored.
        task_masked: m ``[T]``.
        samples: n ``[T]``, test samples of each task.

    Raises:
        ValueError: a shape that differs, an accuracy outside [0, 1] or NaN where one is needed, no samples in a task.
    """

    accuracy: Tensor
    task_masked: Tensor
    samples: Tensor

    def __post_init__(self) -> None:
        for name in ("accuracy", "task_masked", "samples"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=torch.float64).cpu())
        T = self.samples.numel()
        for name, shape in (("accuracy", (T, T)), ("task_masked", (T,)), ("samples", (T,))):
            got = tuple(getattr(self, name).shape)
            if got != shape or T == 0:
                raise ValueError(f"{name}: got shape {got}, expected {shape} for {T} tasks, one at least")
        i, j = torch.tril_indices(T, T)
        for name, values in (("accuracy", self.accuracy[i, j]), ("task_masked", self.task_masked)):
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise ValueError(f"{name}: got {values.tolist()}, expected fractions from 0 to 1")
        if not bool((self.samples > 0).all()):
            raise ValueError(f"samples: got {self.samples.tolist()}, expected at least one a task")

    def __len__(self) -> int:
        return self.samples.numel()


def accuracy_over_tasks(run: TaskAccuracies) -> Tensor:
    """[T]: the accuracy over all test samples of the tasks seen so far, after each task."""
    seen = torch.tril(run.accuracy.nan_to_num() * run.samples).sum(1)
    return seen / run.samples.cumsum(0)


def last(run: TaskAccuracies) -> float:
    """Accuracy over all test samples after the last task."""
    return float(accuracy_over_tasks(run)[-1])


def average(run: TaskAccuracies) -> float:
    """Mean over the tasks of the accuracy over all test samples seen so far."""
    return float(accuracy_over_tasks(run).mean())


def forgetting(run: TaskAccuracies) -> float:
    """Mean drop of each earlier task from its best accuracy to its last one; 0 for a single task."""
    T = len(run)
    if T == 1:
        return 0.0
    best = torch.stack([run.accuracy[j : T - 1, j].max() for j in range(T - 1)])
    return float((best - run.accuracy[T - 1, : T - 1]).mean())


def backward_transfer(run: TaskAccuracies) -> float:
    """Mean change of each earlier task since it was learned; 0 for a single task."""
    T = len(run)
    return 0.0 if T == 1 else float((run.accuracy[T - 1] - run.accuracy.diagonal())[: T - 1].mean())


def learning(run: TaskAccuracies) -> float:
    """Mean accuracy on each task right after learning it, told the task."""
    return float(run.task_masked.mean())


def summary(run: TaskAccuracies) -> dict[str, float]:
    """The five metrics by the names of ``METRICS``, as fractions."""
    values = (last(run), average(run), forgetting(run), backward_transfer(run), learning(run))
    return dict(zip(METRICS, values, strict=True))


@dataclass(frozen=True)
class Estimate:
    """A mean over n runs, the standard deviation of a run (n − 1 in the denominator), and the standard error of the
    mean."""

    mean: float
    sd: float
    se: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From one value a run; sd and se are NaN for a single run.

        Raises:
            ValueError: no values.
        """
        if not values:
            raise ValueError("values: got none, expected one a run")
        v = torch.tensor(values, dtype=torch.float64)
        sd = float(v.std()) if len(values) > 1 else math.nan
        return cls(float(v.mean()), sd, sd / math.sqrt(len(values)))


def summaries(runs: Sequence[TaskAccuracies]) -> dict[str, Estimate]:
    """Mean, standard deviation and standard error of every metric over the runs of one method."""
    per_run = [summary(run) for run in runs]
    return {metric: Estimate.of([s[metric] for s in per_run]) for metric in METRICS}


def paired_gains(runs: Sequence[TaskAccuracies], baseline: Sequence[TaskAccuracies]) -> dict[str, Estimate]:
    """How much better than ``baseline`` the runs did, metric by metric (for forgetting: less of it), run i against run
    i.

    Run i of both must share everything but the method (class order, initial model): the order of the classes moves the
    metrics far more than the method does, and pairing takes it out.

    Raises:
        ValueError: another number of runs, or runs over other test samples.
    """
    if len(runs) != len(baseline):
        raise ValueError(f"runs: got {len(runs)}, expected as many as baseline has, {len(baseline)}")
    for i, (a, b) in enumerate(zip(runs, baseline, strict=True)):
        if not torch.equal(a.samples, b.samples):
            raise ValueError(
                f"runs[{i}]: got samples {a.samples.tolist()}, expected the baseline's {b.samples.tolist()}"
            )
    pairs = [(summary(a), summary(b)) for a, b in zip(runs, baseline, strict=True)]
    return {m: Estimate.of([(a[m] - b[m]) * (1 if HIGHER_IS_BETTER[m] else -1) for a, b in pairs]) for m in METRICS}


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def table(
    results: Mapping[str, Sequence[TaskAccuracies]], columns: Mapping[str, Mapping[str, str]] | None = None
) -> str:
    """A Markdown table of every method: mean ± standard deviation (of a single run: none) of each metric in percent.

    Args:
        results: the runs of each method by its name.
        columns: further columns: for each heading, a cell for every method (absent: an empty one).
    """
    columns = columns or {}
    rows = [["method", *METRICS, *columns]]
    for method, runs in results.items():
        deviates = len(runs) > 1
        cells = [f"{100 * e.mean:.1f}" + f" ± {100 * e.sd:.1f}" * deviates for e in summaries(runs).values()]
        rows.append([method, *cells, *(c.get(method, "") for c in columns.values())])
    return _aligned(rows)


def paired_table(results: Mapping[str, Sequence[TaskAccuracies]], baseline: str) -> str:
    """A Markdown table of every other method's paired gain over ``baseline``: mean ± standard error, in points.

    Positive is better in every column, forgetting included.

    Raises:
        KeyError: ``baseline`` is not among the results.
        ValueError: as :func:`paired_gains`.
    """
    rows = [[f"gain over {baseline}", *METRICS]]
    for method, runs in results.items():
        if method != baseline:
            gains = paired_gains(runs, results[baseline])
            rows.append([method, *(f"{100 * e.mean:+.1f} ± {100 * e.se:.1f}" for e in gains.values())])
    return _aligned(rows)
