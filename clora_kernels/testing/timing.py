"""Time and peak memory of forward and backward, with contestants taking turns.

A round runs every contestant once, each round starting with another one, so that whatever slows the machine for a while
slows all of them; ratios are taken within a round and then their median. On a GPU the L2 cache is flushed before each
measurement and CUDA events are the clock. On a CPU a turn is a burst of calls where one is short: long enough to be
timed, and warm as the layers of a model that follow each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .memory import peak_memory

BURST_SECONDS = 4e-3

Forward = Callable[[], Any]
Backward = Callable[[Any], object]


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile of repeated measurements."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        ordered = sorted(values)
        last = len(ordered) - 1
        return Spread(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


@dataclass
class Rounds:
    """Seconds of each round; the same index is the same round for all contestants of a run."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def both(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]

    def parts(self) -> dict[str, list[float]]:
        return {"forward": self.forward, "backward": self.backward, "both": self.both}

    def ratios(self, yardstick: Rounds) -> dict[str, Spread]:
        """Time over the yardstick's, round by round, for forward, backward and both."""
        theirs = yardstick.parts()
        return {
            name: Spread.of([a / b for a, b in zip(mine, theirs[name], strict=True)])
            for name, mine in self.parts().items()
        }


def take_turns(
    contestants: Mapping[str, tuple[Forward, Backward]],
    device: torch.device,
    seconds: float,
    least: int = 7,
    most: int = 400,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Rounds]:
    """Rounds until ``seconds`` have passed, ``least`` to ``most`` of them, after two that do not count.

    ``clock`` is that of a CPU; ``time.process_time`` sees what this process used where others share the machine.
    """
    names = list(contestants)
    rounds = {name: Rounds() for name in names}
    measure = _Cuda(device).measure if device.type == "cuda" else partial(_measure_cpu, clock, 1)
    for _ in range(2):
        longest = max(sum(measure(*contestants[name])) for name in names)
    if device.type != "cuda":
        measure = partial(_measure_cpu, clock, max(1, round(BURST_SECONDS / longest)))
    start = time.perf_counter()
    for i in range(most):
        if i >= least and time.perf_counter() - start > seconds:
            break
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            forward, backward = measure(*contestants[name])
            rounds[name].forward.append(forward)
            rounds[name].backward.append(backward)
    return rounds


def _measure_cpu(clock: Callable[[], float], calls: int, forward: Forward, backward: Backward) -> tuple[float, float]:
    """Mean seconds of forward and of backward over a burst of calls."""
    seconds_forward = seconds_backward = 0.0
    for _ in range(calls):
        start = clock()
        y = forward()
        middle = clock()
        gradients = backward(y)
        end = clock()
        seconds_forward += middle - start
        seconds_backward += end - middle
        del y, gradients  # alive until the clock has stopped, as a training step keeps them
    return seconds_forward / calls, seconds_backward / calls


class _Cuda:
    """CUDA events around forward and backward, after a write that fills the L2 cache twice."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._filler = torch.empty(2 * size, dtype=torch.int8, device=device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]

    def measure(self, forward: Forward, backward: Backward) -> tuple[float, float]:
        start, middle, end = self._events
        self._filler.zero_()
        start.record()
        y = forward()
        middle.record()
        gradients = backward(y)
        end.record()
        end.synchronize()
        del gradients
        return start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3


def peak_bytes(forward: Forward, backward: Backward, device: torch.device) -> int:
    """Bytes allocated at the worst moment of one forward and backward, y and gradients included."""

    def step() -> object:
        y = forward()
        return y, backward(y)

    return peak_memory(step, device)[1]
