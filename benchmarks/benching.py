"""An operation under pytest-benchmark: forward and backward of every contestant at the named points of the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import environment  # noqa: F401
import pytest
import torch
from operation import Operation

from clora_kernels.testing.timing import peak_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def benchmark_of(operation: Operation) -> Callable[..., None]:
    """The test of an operation, for a contestant at a point; ids end in ``quick`` at the points that stand for the
    others. A contestant is checked before it is timed."""
    points = [pytest.param(p, id=f"{p.name}-quick" if p.quick else p.name) for p in operation.points(DEVICE)]

    @lru_cache(maxsize=1)
    def problem_at(point: Any) -> tuple[Any, Any]:
        problem = operation.make_problem(point, DEVICE)
        return problem, operation.truths(problem)

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.parametrize("name", operation.builders)
    @pytest.mark.parametrize("point", points)
    def test_forward_and_backward(benchmark: Any, point: Any, name: str) -> None:
        reason = operation.why_not(name, point, DEVICE)
        if reason is not None:
            pytest.skip(reason)
        problem, truth = problem_at(point)
        verdict = operation.check(name, problem, truth)
        contestant = operation.builders[name](problem)

        def step() -> None:
            contestant.backward(contestant.forward())
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = str(point)
        peak = peak_bytes(contestant.forward, contestant.backward, DEVICE)
        benchmark.extra_info |= {**vars(verdict), "peak_bytes": peak}
        benchmark(step)

    return test_forward_and_backward
