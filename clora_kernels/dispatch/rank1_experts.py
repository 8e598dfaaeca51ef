"""Rank-1 experts: the dispatch rule and the operators ``torch.ops.clora_kernels.rank1_experts``,
``rank1_experts_backward``, ``rank1_experts_gather`` and ``rank1_experts_gather_backward``.

They take tensors as the public functions do, of any leading dimensions; indices are checked here, or bounded where a
check would wait for the device. A gradient that is not wanted is an empty tensor.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from .. import extension
from ..kernels.rank1_experts import algebra, aten, dense, native
from ..kernels.rank1_experts.algebra import Call, Needs, Primitives
from ..kernels.views import flatten, unflatten
from ..library import define_operator, refuse_forward_mode_below_autograd, without_autocast
from ..reference.routed_lora import accumulation_dtype
from .choice import Choice, check_backend, unavailable
from .indices import bounded, check_range
from .routed_lora import why_not_triton

GATHER = "chosen rows copied, a block at a time, and multiplied"
DENSE = "matmuls over the whole pool, of which the chosen products are kept"
COMPILED = "chosen rows read where they lie, once a row of x"
SAMPLES = "a small dense LoRA a sample, whose rows are read where they lie"
_KERNELS: dict[str, Primitives] = {GATHER: aten, DENSE: dense, COMPILED: native}

# Rows that choose from a pool of at most this many experts for each that they choose go through matmuls of all of it,
# where there are at least so many rows; on a CPU where nothing is compiled. One thread of a Zen 4, 2048 rows of 768 in
# fp32, 8 of 12, 64 and 256 experts, forward and backward in ms: by such matmuls 7, 17 and 54, compiled 7, 8 and 9, by
# copied rows 55. On a GPU the number is an estimate.
_DENSE_POOL = {"cpu": 32, "cuda": 64}
_DENSE_ROWS = 64
# Samples of at least so many rows go through small matmuls of their own on a GPU: an estimate too.
_SAMPLE_ROWS = 16


def choose(
    rows: int, dtype: torch.dtype, experts_A: Tensor, experts_B: Tensor, indices: Tensor, backend: str = "auto"
) -> Choice:
    """The rule, for so many rows of x in ``dtype``: what is named runs or raises; ``auto`` is ``native``
    where it is compiled, but on a GPU ``aten`` for a pool small beside what is chosen, and ``triton`` for samples of
    some length; else ``aten``."""
    check_backend(backend)
    if backend == "reference":
        return _choice(backend, "", backend)
    E, k, device = experts_A.shape[0], indices.shape[-1], experts_A.device.type
    L = rows // max(math.prod(indices.shape[:-1]), 1)
    why_not_native = _why_not_native(dtype, experts_A, experts_B)
    if backend == "native" and why_not_native:
        raise unavailable("rank1_experts", backend, f"{why_not_native}; use 'auto' or 'aten'")
    slower = backend == "aten" or (backend == "auto" and (why_not_native or device != "cpu"))
    if slower and rows >= _DENSE_ROWS and E <= k * _DENSE_POOL.get(device, _DENSE_POOL["cuda"]):
        return _choice("aten", DENSE, backend, f"a row chooses {k} of only {E} experts")
    if backend == "triton" or (backend == "auto" and device == "cuda" and L >= _SAMPLE_ROWS):
        why_not = _why_not_samples(dtype, experts_A, experts_B)
        if backend == "triton" and why_not:
            raise unavailable("rank1_experts", backend, f"{why_not}; use 'auto', 'native' or 'aten'")
        if not why_not:
            return _choice("triton", SAMPLES, backend)
    if backend == "aten" or why_not_native:
        return _choice("aten", GATHER, backend, why_not_native)
    return _choice("native", COMPILED, backend)


def _why_not_native(dtype: torch.dtype, *experts: Tensor) -> str:
    return next(filter(None, (native.why_not(dtype, t) for t in experts)), "")


def _why_not_samples(dtype: torch.dtype, *tensors: Tensor) -> str:
    device = tensors[0].device
    found = (why_not_triton(d, device.type, device.index) for d in (dtype, *(t.dtype for t in tensors)))
    return next(filter(None, found), "")


@cache
def _choice(chosen: str, strategy: str, backend: str, why: str = "") -> Choice:
    named = "named by the caller"
    if chosen == "reference":
        return Choice(chosen, "plain PyTorch", f"{named}; differentiable twice, slower, more memory")
    if chosen == "native":
        return Choice(chosen, strategy, named if backend == chosen else "compiled operators")
    if chosen == "triton":
        return Choice(chosen, strategy, named if backend == chosen else "the rows of a sample share their choice")
    return Choice(chosen, strategy, named if backend == chosen else why)


def _kernels(choice: Choice) -> Primitives:
    """The module of a strategy; Triton is imported where it runs."""
    if choice.backend == "triton":
        from ..kernels.rank1_experts import triton

        return triton
    return _KERNELS[choice.strategy]


def decide(
    rows: int, dtype: torch.dtype, experts_A: Tensor, experts_B: Tensor, indices: Tensor, backend: str
) -> Choice:
    """:func:`choose` for a call that runs now, which warns once where the compiled part is missed."""
    choice = choose(rows, dtype, experts_A, experts_B, indices, backend)
    device_type = experts_A.device.type
    if backend == "auto" and choice.backend == "aten" and not native.is_compiled(device_type):
        extension.warn_once("rank1_experts", device_type)
    return choice


def call_of(
    x: Tensor,
    experts_A: Tensor,
    experts_B: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    scaling: Tensor,
    base_output: Tensor | None,
) -> Call:
    """The arguments in rows and groups."""
    return Call(
        flatten(x),
        experts_A,
        experts_B,
        bounded(flatten(indices), experts_A.shape[0]),
        None if gates is None else flatten(gates),
        scaling,
        None if base_output is None else flatten(base_output),
    )


def run_forward(
    x: Tensor,
    experts_A: Tensor,
    experts_B: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    scaling: Tensor,
    base_output: Tensor | None,
    choice: Choice,
) -> tuple[Tensor, Tensor]:
    """y [..., N] and p [M, k], which backward may read."""
    with without_autocast(x):
        call = call_of(x, experts_A, experts_B, indices, gates, scaling, base_output)
        y, p = algebra.forward(_kernels(choice), call)
    return unflatten(y, x.shape[:-1]), p


def run_backward(
    dy: Tensor,
    x: Tensor | None,
    experts_A: Tensor,
    experts_B: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    scaling: Tensor,
    p: Tensor | None,
    dtype: torch.dtype,
    need: Needs,
    choice: Choice,
) -> list[Tensor | None]:
    """The gradients in the order of ``Needs``, None for one that is not wanted; x in ``dtype`` is there if experts_A
    needs one, p if ``need.p``."""
    with without_autocast(dy):
        rows = dy.new_empty(0, dtype=dtype).expand(*dy.shape[:-1], 0) if x is None else x
        call = call_of(rows, experts_A, experts_B, indices, gates, scaling, None)
        dx, dA, dB, dgates, dscaling = algebra.backward(_kernels(choice), flatten(dy), call, p, need)
    if dx is not None:
        dx = unflatten(dx, dy.shape[:-1])
    if dgates is not None:
        dgates = unflatten(dgates, gates.shape[:-1])  # type: ignore[union-attr]
    return [dx, dA, dB, dgates, dscaling]


def _forward(
    x: Tensor,
    experts_A: Tensor,
    experts_B: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    scaling: Tensor,
    base_output: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    refuse_forward_mode_below_autograd("rank1_experts", (x, experts_A, experts_B, gates, scaling, base_output))
    check_range("indices", indices, experts_A.shape[0])
    choice = decide(math.prod(x.shape[:-1]), x.dtype, experts_A, experts_B, indices, backend)
    return run_forward(x, experts_A, experts_B, indices, gates, scaling, base_output, choice)


def _forward_fake(
    x: Tensor,
    experts_A: Tensor,
    experts_B: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    scaling: Tensor,
    base_output: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    dtype = x.dtype if base_output is None else base_output.dtype
    p = x.new_empty(math.prod(lead), indices.shape[-1], dtype=accumulation_dtype(x.dtype))
    return x.new_empty(*lead, experts_B.shape[1], dtype=dtype), p


def _backward(
    dy: Tensor,
    x: Tensor | None,
    experts_A: Tensor,
    experts_B: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    scaling: Tensor,
    p: Tensor | None,
    dtype: torch.dtype,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    choice = choose(math.prod(dy.shape[:-1]), dtype, experts_A, experts_B, indices, backend)
    need = Needs(*needs)
    grads = run_backward(dy, x, experts_A, experts_B, indices, gates, scaling, p, dtype, need, choice)
    return [dy.new_empty(0) if g is None else g for g in grads]


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    experts_A: Tensor,
    experts_B: Tensor,
    indices: Tensor,
    gates: Tensor | None,
    scaling: Tensor,
    p: Tensor | None,
    dtype: torch.dtype,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    dx = dy.new_empty(*dy.shape[:-1], experts_A.shape[1] if needs[0] else 0, dtype=dtype)
    like = [dx, experts_A, experts_B, gates, scaling]
    return [
        t.new_empty(t.shape) if need and t is not None else dy.new_empty(0) for t, need in zip(like, needs, strict=True)
    ]


rank1_experts = define_operator(
    "rank1_experts(Tensor x, Tensor experts_A, Tensor experts_B, Tensor indices, Tensor? gates, Tensor scaling, "
    "Tensor? base_output, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
rank1_experts_backward = define_operator(
    "rank1_experts_backward(Tensor dy, Tensor? x, Tensor experts_A, Tensor experts_B, Tensor indices, Tensor? gates, "
    "Tensor scaling, Tensor? p, ScalarType dtype, bool[] needs, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _gather_kernels(experts: Tensor) -> Primitives:
    return aten if native.why_not(experts.dtype, experts) else native


def _gather(experts: Tensor, indices: Tensor, gates: Tensor | None) -> Tensor:
    check_range("indices", indices, experts.shape[0])
    with without_autocast(experts):
        return algebra.gather(_gather_kernels(experts), experts, bounded(indices, experts.shape[0]), gates)


def _gather_fake(experts: Tensor, indices: Tensor, gates: Tensor | None) -> Tensor:
    return experts.new_empty(*indices.shape, experts.shape[1])


def _gather_backward(
    d: Tensor, experts: Tensor, indices: Tensor, gates: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    with without_autocast(d):
        inside, need = bounded(indices, experts.shape[0]), (needs[0], needs[1])
        grads = algebra.gather_backward(_gather_kernels(experts), d, experts, inside, gates, need)
    first, second = (d.new_empty(0) if g is None else g for g in grads)
    return first, second


def _gather_backward_fake(
    d: Tensor, experts: Tensor, indices: Tensor, gates: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    of_gates = gates.new_empty(gates.shape) if needs[1] and gates is not None else d.new_empty(0)
    return experts.new_empty(experts.shape) if needs[0] else d.new_empty(0), of_gates


rank1_experts_gather = define_operator(
    "rank1_experts_gather(Tensor experts, Tensor indices, Tensor? gates) -> Tensor", _gather, _gather_fake
)
rank1_experts_gather_backward = define_operator(
    "rank1_experts_gather_backward(Tensor d, Tensor experts, Tensor indices, Tensor? gates, bool[] needs) -> "
    "(Tensor, Tensor)",
    _gather_backward,
    _gather_backward_fake,
)
