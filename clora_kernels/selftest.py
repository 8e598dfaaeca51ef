"""Proof on the user's own device in seconds: parity with fp64, adapter fidelity, orthogonality, and time against the
frozen linear and ``torch.linalg.qr``."""

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

from .autograd.gram_schmidt import gram_schmidt
from .autograd.rank1_experts import rank1_experts
from .autograd.routed_lora import routed_lora_linear
from .kernels.cpu_matmul import goes_to_onednn
from .reference import gram_schmidt as gram_schmidt_reference
from .reference import rank1_experts as experts_reference
from .reference.rank1_experts_samples import make_inputs as experts_inputs
from .testing import Deviation, assert_fidelity, assert_orthonormal, assert_parity, hard_matrices, mixed_batch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDS = 7

Run = Callable[[bool], None]  # forward, and backward if true


@dataclass(frozen=True)
class Case:
    """One line of the report: what was checked, whether it holds, and the figures or the failure."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class SelftestReport:
    """All cases; ``ratios`` are times over those of what does the least, or the same in another way, by what was timed;
    None where the time was up before; ``note``, what one should know to read them."""

    device: str
    cases: list[Case]
    ratios: dict[str, float | None]
    note: str = ""

    @property
    def ok(self) -> bool:
        return all(case.ok for case in self.cases)

    def __str__(self) -> str:
        lines = [f"device {self.device}"]
        lines += [f"{'ok  ' if case.ok else 'FAIL'} {case.name:<40} {case.detail}" for case in self.cases]
        for name, ratio in self.ratios.items():
            faster = f" ({1 / ratio:.2f} times faster)" if ratio and ratio < 1 else ""
            told = "left out: the time was up" if ratio is None else f"{ratio:.3f}{faster}"
            lines.append(f"time: {name:<64} {told}")
        if self.note:
            lines.append(f"      {self.note}")
        failed = sum(not case.ok for case in self.cases)
        lines.append(f"{len(self.cases) - failed} passed, {failed} failed")
        return "\n".join(lines)


def selftest(device: torch.device, seconds: float = 20.0) -> SelftestReport:
    """Check routed LoRA, Gram-Schmidt and rank-1 experts on ``device`` in every 16- and 32-bit dtype, and time the
    first two against F.linear and ``torch.linalg.qr``.

    A failing check is a line of the report, not an exception; a time is taken of a right result only. Every check is
    made; no further round of timing begins once ``seconds`` have passed.
    """
    deadline = time.monotonic() + seconds
    cases = [case for dtype in _DTYPES for case in _check(dtype, device)]
    ratios: dict[str, float | None] = {}
    if all(case.ok for case in cases):
        for dtype in (torch.float32, torch.bfloat16):
            ratios |= _time(f"routed LoRA / frozen linear, {_short(dtype)}", _linears(dtype, device), device, deadline)
        ratios |= _time("gram_schmidt / torch.linalg.qr, float32", _factorisations(device), device, deadline)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return SelftestReport(name, cases, ratios, _note(device) if ratios else "")


ODD, EVEN = (3, 67, 515, 387, 12), (2, 256, 1024, 512, 16)
"""Sizes S, L, K, N, r that divide nothing, and some for which libraries have their fastest kernels: other ones."""


def _inputs(
    dtype: torch.dtype, device: torch.device, options: str, size: float, sizes: tuple[int, ...] = ODD
) -> dict[str, Any]:
    """x [S, L, K], W, A, B and an adapter of ``size`` times y; ``options`` adds to them."""
    generator = torch.Generator(device="cpu").manual_seed(len(options) + 1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    S, L, K, N, r = sizes
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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(dtype: torch.dtype, device: torch.device) -> list[Case]:
    short, cases = _short(dtype), []
    for options in ("plain", "routing", "bank", "everything"):
        inputs = _inputs(dtype, device, options, size=0.3)
        S, L, _, N, _ = ODD
        dy = torch.randn(S, L, N, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        cases.append(_case(f"parity {short} {options}", partial(_parity, inputs, dy)))
    for name, sizes in (("odd", ODD), ("even", EVEN)):
        small = _inputs(dtype, device, "routing", 1e-3, sizes)
        cases.append(_case(f"fidelity {short}, {name}, adapter 1e-3 of y", partial(_fidelity, small)))
    return [
        *cases,
        _case(f"gram_schmidt {short}, hard matrices", partial(_orthogonality, dtype, device)),
        _case(f"gram_schmidt {short}, gradients", partial(_gradients, dtype, device)),
        *(
            _case(f"rank1_experts {short}, {name}", partial(_experts, dtype, device, **options))
            for name, options in (
                ("a pool by token", {"E": 400}),
                ("a pool by sample", {"E": 400, "per_sample": True}),
                ("a small pool", {"E": 12}),
            )
        ),
    ]


def _fidelity(inputs: dict[str, Any]) -> str:
    return str(assert_fidelity(routed_lora_linear(**inputs), **inputs))


def _parity(inputs: dict[str, Any], dy: Tensor) -> str:
    return _within(assert_parity(routed_lora_linear, inputs, dy=dy))


def _within(deviations: dict[str, Deviation]) -> str:
    worst = max(d.frobenius / d.frobenius_bound for d in deviations.values() if d.frobenius_bound)
    return f"y and {len(deviations) - 1} gradients within {worst:.2f} of what rounding explains"


def _experts(dtype: torch.dtype, device: torch.device, **options: Any) -> str:
    S, L, K, N, _ = ODD
    inputs = experts_inputs((S, L), K, N, k=8, dtype=dtype, experts_dtype=torch.float32, device=device, **options)
    dy = torch.randn(S, L, N, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return _within(assert_parity(rank1_experts, inputs, dy=dy, reference=experts_reference))


def _orthogonality(dtype: torch.dtype, device: torch.device) -> str:
    V, matrices = mixed_batch(hard_matrices(131, 12, dtype=dtype, device=device))
    assert_orthonormal(gram_schmidt(V), V, ranks=[matrix.rank for matrix in matrices])
    return f"{len(matrices)} matrices in one batch, each orthonormal, reconstructed and of the right rank"


def _gradients(dtype: torch.dtype, device: torch.device) -> str:
    """Of V and of a basis beside it: within twice the error of the formulas in the same dtype, and a spacing."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    V, dQ, P = normal(5, 131, 12).to(dtype), normal(5, 131, 12).to(dtype), torch.linalg.qr(normal(131, 7)).Q.float()
    dR = normal(5, 12, 12).float().triu()
    leaves = V.clone().requires_grad_(), P.clone().requires_grad_()
    result = gram_schmidt(*leaves)
    got = torch.autograd.grad(result[:2], leaves, (dQ, dR))
    assert_orthonormal(result, V, P, ranks=[12] * 5)

    def formulas(*tensors: Tensor) -> gram_schmidt_reference.Gradients:
        dQ, dR, V, P = tensors
        Q, R, _ = gram_schmidt_reference.forward(V, P)
        return gram_schmidt_reference.backward(dQ, dR, V, P, Q, R)

    plain, truth = formulas(dQ, dR, V, P), formulas(*(t.double() for t in (dQ, dR, V, P)))
    shares = []
    for name, mine, same, true in zip(truth._fields, got, plain, truth, strict=True):
        assert same is not None and true is not None
        error, of_same = (float((g.double() - true).norm()) for g in (mine, same))
        bound = 2 * of_same + torch.finfo(mine.dtype).eps * float(true.norm())
        if not error <= bound:
            raise AssertionError(f"gradient of {name}: error {error:.3e}, expected at most {bound:.3e}")
        shares.append(error / bound)
    return f"those of V and against within {max(shares):.2f} of what rounding explains"


def _case(name: str, check: Callable[[], str]) -> Case:
    try:
        return Case(name, True, check())
    except Exception as error:  # whatever goes wrong on this device is the finding
        return Case(name, False, f"{type(error).__name__}: {error}")


def _note(device: torch.device) -> str:
    """Why the layer may be faster than what it contains."""
    M, K, N, _ = _sizes(device)
    x, weight = torch.empty(M, K, device=device), torch.empty(N, K, device=device)
    if not goes_to_onednn(x, weight.mT):
        return ""
    return (
        "float32: routed LoRA takes oneDNN's matmuls here, where F.linear, the frozen linear, takes MKL's, whose "
        "AVX-512 kernels run on Intel's processors alone: the layer may be the faster one"
    )


def _sizes(device: torch.device) -> tuple[int, int, int, int]:
    """M, K, N, r of the layers that are timed."""
    return (8192, 4096, 4096, 16) if device.type == "cuda" else (1024, 1024, 1024, 16)


def _linears(dtype: torch.dtype, device: torch.device) -> tuple[Run, Run]:
    """Routed LoRA as plain LoRA, and the frozen linear."""
    M, K, N, r = _sizes(device)
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

    return ours, frozen


def _factorisations(device: torch.device) -> tuple[Run, Run]:
    """Gram-Schmidt and Householder's QR of the factors of a model."""
    B, d, r = (64, 4096, 16) if device.type == "cuda" else (48, 768, 16)
    V = torch.randn(B, d, r, device=device, requires_grad=True)
    gradients = torch.randn(B, d, r, device=device), torch.randn(B, r, r, device=device).triu()

    def run(factorise: Callable[[Tensor], Any], backward: bool) -> None:
        Q, R = factorise(V)[:2]
        if backward:
            torch.autograd.grad((Q, R), V, gradients)

    return partial(run, gram_schmidt), partial(run, torch.linalg.qr)


def _time(name: str, runs: tuple[Run, Run], device: torch.device, deadline: float) -> dict[str, float | None]:
    """Median over rounds of ours' time over the other's, both taken in turn within each round."""
    ours, other = runs
    ratios: dict[str, float | None] = {}
    for part, backward in (("forward", False), ("forward + backward", True)):
        rounds: list[float] = []
        while len(rounds) <= _ROUNDS and time.monotonic() < deadline:
            rounds.append(_seconds(ours, backward, device) / _seconds(other, backward, device))
        ratios[f"{name} {part}"] = statistics.median(rounds[1:]) if rounds[1:] else None  # the first warms up
    return ratios


def _seconds(fn: Run, backward: bool, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    fn(backward)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
