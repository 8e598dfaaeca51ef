"""Routed LoRA under pytest-benchmark: forward and backward of every contestant at the named points of the device.

    python -m pytest benchmarks/bench_routed_lora.py -k "quick and ours" --benchmark-json=out.json

Ids end in ``quick`` at the points that stand for the others. A contestant is checked before it is timed, as in run.py.
That one also alternates contestants and so is the better judge of their ratios; here each is timed by itself, to follow
one over time.
"""

from __future__ import annotations

from functools import lru_cache

import environment  # noqa: F401
import pytest
import torch
from checks import check, truths
from contestants import BUILDERS, Problem, make_problem, why_not
from points import Point, points_of
from torch import Tensor

from clora_kernels.testing.timing import peak_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POINTS = [pytest.param(p, id=f"{p.name}-quick" if p.quick else p.name) for p in points_of(DEVICE)]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@lru_cache(maxsize=1)
def _problem(point: Point) -> tuple[Problem, dict[str, Tensor]]:
    problem = make_problem(point, DEVICE)
    return problem, truths(problem)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("point", POINTS)
def test_forward_and_backward(benchmark, point: Point, name: str) -> None:
    reason = why_not(name, point, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    problem, truth = _problem(point)
    verdict = check(name, problem, truth)
    contestant = BUILDERS[name](problem, point.dropout_p)

    def step() -> None:
        contestant.backward(contestant.forward())
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(point)
    peak = peak_bytes(contestant.forward, contestant.backward, DEVICE)
    benchmark.extra_info |= {"alpha": verdict.alpha, "peak_bytes": peak}
    benchmark(step)
