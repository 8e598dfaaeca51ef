"""The least time a computation can take: bytes and FLOPs of each step under ceilings measured in the same run.

A step takes at least as long as its FLOPs at the rate of a large square matmul and as its bytes, each operand read once
and each result written once, at the rate of a large copy. What stays in a cache between steps can beat a floor whose
every step reads memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from clora_kernels.kernels.cpu_matmul import matmul


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a large copy (reads and writes counted) and FLOPs a second of a large matmul by dtype."""

    bytes_per_second: float
    flops_per_second: dict[torch.dtype, float]

    def as_json(self) -> dict[str, float]:
        rates = {f"matmul_{str(d).removeprefix('torch.')}_tflops": f / 1e12 for d, f in self.flops_per_second.items()}
        return {"copy_gb_per_second": self.bytes_per_second / 1e9, **rates}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in self.as_json().items())


@dataclass(frozen=True)
class Step:
    """One kernel launch of the ideal implementation."""

    name: str
    flops: int
    bytes: int

    def seconds(self, ceilings: Ceilings, dtype: torch.dtype) -> float:
        return max(self.flops / ceilings.flops_per_second[dtype], self.bytes / ceilings.bytes_per_second)


@dataclass(frozen=True)
class Floor:
    """Steps of forward and of backward."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]

    def seconds(self, ceilings: Ceilings, dtype: torch.dtype) -> dict[str, float]:
        forward = sum(step.seconds(ceilings, dtype) for step in self.forward)
        backward = sum(step.seconds(ceilings, dtype) for step in self.backward)
        return {"forward": forward, "backward": backward, "both": forward + backward}

    def as_json(self) -> dict[str, dict[str, int]]:
        parts = {"forward": self.forward, "backward": self.backward, "both": self.forward + self.backward}
        return {
            name: {"flops": sum(s.flops for s in steps), "bytes": sum(s.bytes for s in steps), "launches": len(steps)}
            for name, steps in parts.items()
        }


def measure_ceilings(
    device: torch.device, dtypes: tuple[torch.dtype, ...], clock: Callable[[], float] = time.perf_counter
) -> Ceilings:
    """The best of several large copies and of several large matmuls of each dtype, by whichever library is faster."""
    on_gpu = device.type == "cuda"
    source = torch.randn((1 << 28) if on_gpu else (1 << 25), device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device, clock)
    size = 8192 if on_gpu else 2048
    rates = {}
    for dtype in dtypes:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        rates[dtype] = 2 * size**3 / _best_seconds(lambda a=a, b=b: matmul(a, b), device, clock)
    return Ceilings(2 * source.numel() * source.element_size() / copy, rates)


def _best_seconds(run: Callable[[], object], device: torch.device, clock: Callable[[], float], times: int = 8) -> float:
    best = float("inf")
    for _ in range(times):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        else:
            begin = clock()
            run()
            seconds = clock() - begin
        best = min(best, seconds)
    return best
