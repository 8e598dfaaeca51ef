"""Proof on the user's own device in seconds: parity with fp64, adapter fidelity, and time against the frozen linear."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd.routed_lora import routed_lora_linear
from .testing import assert_fidelity, assert_parity

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDS = 7


@dataclass(frozen=True)
class Case:
    """One line of the report: what was checked, whether it holds, and the figures or the failure."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class SelftestReport:
    """All cases; ``ratios`` are times of the layer over those of the frozen linear, by what was timed, None where the
    time was up before."""

    device: str
    cases: list[Case]
    ratios: dict[str, float | None]

    @property
    def ok(self) -> bool:
        return all(case.ok for case in self.cases)

    def __str__(self) -> str:
        lines = [f"device {self.device}"]
        lines += [f"{'ok  ' if case.ok else 'FAIL'} {case.name:<40} {case.detail}" for case in self.cases]
        for name, ratio in self.ratios.items():
            told = "left out: the time was up" if ratio is None else f"{ratio:.3f}"
            lines.append(f"time / frozen linear     {name:<24} {told}")
        failed = sum(not case.ok for case in self.cases)
        lines.append(f"{len(self.cases) - failed} passed, {failed} failed")
        return "\n".join(lines)


def selftest(device: torch.device, seconds: float = 20.0) -> SelftestReport:
    """Check routed LoRA on ``device`` in every 16- and 32-bit dtype, every option, and time it against F.linear.

    A failing check is a line of the report, not an exception; a time is taken of a right result only. Every check is
    made; no further round of timing begins once ``seconds`` have passed.
    """
    deadline = time.monotonic() + seconds
    cases = [case for dtype in _DTYPES for case in _check(dtype, device)]
    ratios: dict[str, float | None] = {}
    if all(case.ok for case in cases):
        for dtype in (torch.float32, torch.bfloat16):
            ratios |= _time(dtype, device, deadline)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return SelftestReport(name, cases, ratios)


def _inputs(dtype: torch.dtype, device: torch.device, options: str, size: float) -> dict[str, Any]:
    """x, W, A, B of unequal sizes that divide nothing and an adapter of ``size`` times y; ``options`` adds to them."""
    generator = torch.Generator(device="cpu").manual_seed(len(options) + 1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    S, L, K, N, r = 3, 67, 515, 387, 12
    inputs: dict[str, Any] = {
        "x": normal(S, L, K).to(dtype),
        "weight": normal(N, K, scale=K**-0.5).to(dtype),
        "lora_A": normal(r, K, scale=K**-0.5),
        "lora_B": normal(N, r, scale=size * r**-0.5),
        "scaling": 0.75,
    }
    if options in ("routing", "everything"):
        inputs["routing"] = torch.eye(r, device=device) + normal(r, r, scale=0.1)
        inputs["frozen_routing"] = normal(r, r, scale=0.3)
    if options == "bank":
        inputs["routing"] = torch.eye(r, device=device) + normal(4, r, r, scale=0.1)
        inputs["routing_index"] = torch.tensor([2, 0, 2], device=device)
    if options == "everything":
        inputs["bias"], inputs["gate"] = normal(N), 1 + normal(S, L, r, scale=0.1)
        inputs["dropout_p"], inputs["dropout_seed"] = 0.1, torch.tensor(20261, device=device)
    return inputs


def _check(dtype: torch.dtype, device: torch.device) -> list[Case]:
    short, cases = str(dtype).removeprefix("torch."), []
    for options in ("plain", "routing", "bank", "everything"):
        inputs = _inputs(dtype, device, options, size=0.3)
        dy = torch.randn(3, 67, 387, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        cases.append(_case(f"parity {short} {options}", partial(_parity, inputs, dy)))
    small = _inputs(dtype, device, "routing", size=1e-3)
    return [*cases, _case(f"fidelity {short}, adapter 1e-3 of y", partial(_fidelity, small))]


def _fidelity(inputs: dict[str, Any]) -> str:
    return str(assert_fidelity(routed_lora_linear(**inputs), **inputs))


def _parity(inputs: dict[str, Any], dy: Tensor) -> str:
    deviations = assert_parity(routed_lora_linear, inputs, dy=dy)
    worst = max(d.frobenius / d.frobenius_bound for d in deviations.values() if d.frobenius_bound)
    return f"y and {len(deviations) - 1} gradients within {worst:.2f} of what rounding explains"


def _case(name: str, check: Callable[[], str]) -> Case:
    try:
        return Case(name, True, check())
    except Exception as error:  # whatever goes wrong on this device is the finding
        return Case(name, False, f"{type(error).__name__}: {error}")


def _time(dtype: torch.dtype, device: torch.device, deadline: float) -> dict[str, float | None]:
    """Median over rounds of the layer's time over the frozen linear's, both taken in turn within each round."""
    M, K, N, r = (8192, 4096, 4096, 16) if device.type == "cuda" else (1024, 1024, 1024, 16)
    x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(N, K, device=device, dtype=dtype) * K**-0.5
    lora_A = (torch.randn(r, K, device=device) * K**-0.5).requires_grad_()
    lora_B = torch.zeros(N, r, device=device, requires_grad=True)
    dy = torch.randn(M, N, device=device, dtype=dtype)

    def ours(backward: bool) -> None:
        y = routed_lora_linear(x, weight, lora_A, lora_B)
        if backward:
            torch.autograd.grad(y, (x, lora_A, lora_B), dy)

    def frozen(backward: bool) -> None:
        y = F.linear(x, weight)
        if backward:
            torch.autograd.grad(y, x, dy)

    ratios: dict[str, float | None] = {}
    for name, backward in (("forward", False), ("forward + backward", True)):
        rounds: list[float] = []
        while len(rounds) <= _ROUNDS and time.monotonic() < deadline:
            rounds.append(_seconds(ours, backward, device) / _seconds(frozen, backward, device))
        short = str(dtype).removeprefix("torch.")
        ratios[f"{short} {name}"] = statistics.median(rounds[1:]) if rounds[1:] else None  # the first warms up
    return ratios


def _seconds(fn: Callable[[bool], None], backward: bool, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    fn(backward)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
