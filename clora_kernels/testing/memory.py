"""What a call costs in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def peak_memory(step: Callable[[], T], device: str | torch.device = "cpu") -> tuple[T, int]:
    """Run ``step`` once; its result, and the most bytes it had allocated at a time beyond what was there before, the
    result included.

    Of torch's allocator on either device, exactly; scratch a matmul library allocates by itself is not seen. On a CPU
    from the allocation events of torch's profiler, so with its overhead: do not time the same call.

    Raises:
        ValueError: another kind of device.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = step()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"device: got {str(device)!r}, expected a CPU or a CUDA device")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = step()
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak
