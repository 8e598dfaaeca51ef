"""Routed LoRA: the dispatch rule and the operators ``torch.ops.clora_kernels.routed_lora`` and
``routed_lora_backward``.

One operator serves a layer (one projection of x) and a group (several). Projections travel as the list of their tensors
and ``given``, which says for each field of each projection whether its tensor is there: dispatcher schemas have no
differentiable lists of optional tensors. Gradients come back for x first, then for each ``Needs`` field of each
projection; one that is not wanted is an empty tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .. import extension
from ..kernels.routed_lora import aten, compiled, composite, layer
from ..kernels.routed_lora.algebra import Needs, Primitives, Projection, backward, forward, keeps_p
from ..kernels.routed_lora.tables import Table, call_of, table_of
from ..library import define_operator, refuse_forward_mode_below_autograd, without_autocast
from ..reference.routed_lora import accumulation_dtype
from .choice import Choice, check_backend, unavailable
from .indices import bounded, check_range

_NAMED = "named by the caller"
_COMPOSITE = "plain matmuls, differentiated by ATen"


def _primitives(backend: str) -> Primitives:
    """The module of a backend that was chosen; Triton is imported where it runs."""
    if backend == "triton":
        from ..kernels.routed_lora import triton

        return triton
    return aten


def choose(x: Tensor, projections: Sequence[Projection], backend: str = "auto") -> Choice:
    """The rule: what is named runs or raises; ``auto`` is ``triton`` where a table measured on this very device says
    that it wins, ``composite`` for a plain call in fp32 or fp64 on a CPU with next to nothing to compute, ``native``
    for a plain layer with little to compute there, else ``aten``, the only backend that is proved on every device."""
    if backend == "composite":
        if why_not := composite.why_not(x, projections):
            raise unavailable("routed_lora", backend, f"{why_not}; use 'auto' or 'aten'")
        return Choice(backend, _COMPOSITE, _NAMED)  # Dynamo, which comes by here, warns of a cache
    if backend == "auto" and x.is_cpu and not table_of(x).calls and not composite.why_not(x, projections):
        M, learning = math.prod(x.shape[:-1]), learns(x, [t for j in projections for t in j if t is not None])
        if all(composite.is_faster(M, j.lora_A.shape[1], j.lora_B.shape[0], learning) for j in projections):
            return _choice("composite", backend)
    return _choose_operator(x, projections, backend)


def glance(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, learning: bool) -> str:
    """What :func:`choose` says of a plain layer whose tensors are right, where that is "composite" or "native"; else
    nothing."""
    if not x.is_cpu or table_of(x).calls:
        return ""
    dtype, M = x.dtype, math.prod(x.shape[:-1])
    if dtype in composite.DTYPES:
        of_one_dtype = lora_A.dtype == lora_B.dtype == dtype and (bias is None or bias.dtype == dtype)
        if of_one_dtype and composite.is_faster(M, weight.shape[1], weight.shape[0], learning):
            return "composite"
    takes = compiled.takes(x) and layer.takes(lora_A) and layer.takes(lora_B)
    return "native" if takes and layer.has_little_work(M, lora_A, lora_B) and layer.is_built() else ""


def learns(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether a call has a backward; a Function takes as long as a small layer to find that it has none."""
    return torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors))


def _choose_operator(x: Tensor, projections: Sequence[Projection], backend: str) -> Choice:
    """The rule among the backends that the operators have. Forward and backward of a call come to the same."""
    why = ""
    if backend != "auto":
        check_backend(backend, "composite")
    elif (table := table_of(x)).calls:
        wins, why = _says(table, x, projections)
        if wins:
            return _choice("triton", backend, why)
    else:
        why = table.silence
    if backend in ("auto", "native"):
        why_not = layer.why_not(x, projections)
        if backend == "native" and why_not:
            raise unavailable("routed_lora", backend, f"{why_not}; use 'auto' or 'aten'")
        if why_not in ("", extension.CPU_MISSING) and (
            backend == "native" or layer.has_little_work(math.prod(x.shape[:-1]), *projections[0][1:3])
        ):
            if not why_not:
                return _choice("native", backend)
            why = why_not
    if backend == "triton" and (why_not := why_not_triton(x.dtype, x.device.type, x.device.index)):
        raise unavailable("routed_lora", backend, f"{why_not}; use 'auto' or 'aten'")
    chosen = backend if backend in ("reference", "triton") else "aten"
    return _choice(chosen, backend, why, x.dtype, projections[0].base_output is not None)


def decide(x: Tensor, projections: Sequence[Projection], backend: str = "auto", operator: bool = False) -> str:
    """The backend of a call that runs now, or of one inside the ``operator``, which warns once where the compiled part
    is missed."""
    choice = (_choose_operator if operator else choose)(x, projections, backend)
    if choice.reason == extension.CPU_MISSING:
        extension.warn_once("routed_lora", x.device.type)
    return choice.backend


def _says(table: Table, x: Tensor, projections: Sequence[Projection]) -> tuple[bool, str]:
    """Whether a table says that triton wins this call, and what it says."""
    verdict = table.calls.get(call_of(x.dtype, math.prod(x.shape[:-1]), projections))
    if verdict is None:
        return False, table.silence
    return verdict.wins and not why_not_triton(x.dtype, x.device.type, x.device.index), verdict.reason


@cache
def _choice(
    chosen: str, backend: str, why: str = "", dtype: torch.dtype | None = None, has_base_output: bool = False
) -> Choice:
    if chosen == "reference":
        return Choice(chosen, "plain PyTorch", f"{_NAMED}; differentiable twice, slower, more memory")
    if chosen == "composite":
        return Choice(chosen, _COMPOSITE, "a small plain call")
    if chosen == "native":
        strategy = "what is of rank r first, in one compiled call or by MKL; the frozen matmul accumulates on it"
        return Choice(chosen, strategy, _NAMED if backend == chosen else "a plain layer with little to compute")
    if chosen == "triton":
        return Choice(chosen, "fused kernels, low-rank term and frozen matmul in one fp32 sum", why or _NAMED)
    if has_base_output:
        strategy = "low-rank term added onto base_output in one fp32 sum"
    elif dtype in (torch.bfloat16, torch.float16):
        strategy = "low-rank term first, frozen matmul accumulates on it in fp32"
    else:
        strategy = "frozen matmul first, low-rank term added onto it in the same precision"
    return Choice(chosen, strategy, why or _NAMED)


def why_not_triton(dtype: torch.dtype, device_type: str, device_index: int | None) -> str:
    """Why the Triton kernels cannot run such a tensor; empty if they can."""
    return _why_not_triton(dtype, device_type, device_index)


why_not_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo can trace neither it nor a cache


@cache
def _why_not_triton(dtype: torch.dtype, device_type: str, device_index: int | None) -> str:
    try:
        from triton import knobs
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if dtype == torch.float64:
        return "its kernels sum in fp32, and the tensors are fp64"
    if device_type == "cpu":
        return "" if knobs.runtime.interpret else "its kernels run on a GPU (on the CPU only under TRITON_INTERPRET=1)"
    if device_type != "cuda" or torch.version.hip:
        return f"its kernels run on NVIDIA GPUs, not on {'rocm' if torch.version.hip else device_type}"
    major, minor = torch.cuda.get_device_capability(device_index)
    if major < 8 and not knobs.runtime.interpret:
        return f"its kernels need compute capability 8.0, and the GPU has {major}.{minor}"
    return ""


def check_index(j: Projection, prefix: str = "") -> None:
    """IndexError for a routing_index outside the bank."""
    if j.routing_index is not None:
        check_range(f"{prefix}routing_index", j.routing_index, j.routing.shape[0])


def _in_bounds(j: Projection) -> Projection:
    if j.routing_index is None or j.routing_index.is_cpu:
        return j
    return j._replace(routing_index=bounded(j.routing_index, j.routing.shape[0]))


def pack_projections(projections: Sequence[Projection]) -> tuple[list[Tensor], list[bool]]:
    """The tensors that are there, and for every field of every projection whether it is."""
    fields = [t for j in projections for t in j]
    return [t for t in fields if t is not None], [t is not None for t in fields]


def unpack_projections(tensors: Sequence[Tensor], given: Sequence[bool]) -> list[Projection]:
    """The inverse of ``pack_projections``."""
    remaining = iter(tensors)
    fields = [next(remaining) if there else None for there in given]
    size = len(Projection._fields)
    return [Projection(*fields[i : i + size]) for i in range(0, len(fields), size)]


def _unpack_needs(needs: Sequence[bool]) -> list[Needs]:
    size = len(Needs._fields)
    return [Needs(*needs[i : i + size]) for i in range(0, len(needs), size)]


def run_forward(x: Tensor, projections: list[Projection], backend: str) -> list[Tensor]:
    """The y of each projection, then what each keeps for backward. Indices are checked, or bounded here."""
    with without_autocast(x):
        if backend == "native":
            ys, kept = layer.forward(x, projections[0])
        else:
            ys, kept = forward(_primitives(backend), x, [_in_bounds(j) for j in projections])
    return ys + kept


def run_backward(
    dys: list[Tensor],
    x: Tensor | None,
    kept: list[Tensor],
    dtype: torch.dtype,
    need_x: bool,
    needs: Sequence[Needs],
    projections: list[Projection],
    backend: str,
) -> list[Tensor | None]:
    """dx, then each projection's gradients in the order of ``Needs``; None for what is not wanted."""
    with without_autocast(dys[0]):
        if backend == "native":
            dx, of_projections = layer.backward(dys[0], x, projections[0], kept[0], need_x, needs[0], dtype)
        else:
            inside = [_in_bounds(j) for j in projections]
            dx, of_projections = backward(_primitives(backend), dys, x, inside, kept, need_x, needs, dtype)
    return [dx] + [g for of_one in of_projections for g in of_one]


def _forward(x: Tensor, tensors: list[Tensor], given: list[bool], backend: str) -> list[Tensor]:
    refuse_forward_mode_below_autograd("routed_lora", (x, *tensors))
    projections = unpack_projections(tensors, given)
    for j in projections:
        check_index(j)
    return run_forward(x, projections, decide(x, projections, backend, operator=True))


def _forward_fake(x: Tensor, tensors: list[Tensor], given: list[bool], backend: str) -> list[Tensor]:
    projections = unpack_projections(tensors, given)
    lead = x.shape[:-1]
    M = math.prod(lead)  # Size.numel() would tie the graph to this M
    ys = [
        x.new_empty(*lead, j.lora_B.shape[0], dtype=x.dtype if j.base_output is None else j.base_output.dtype)
        for j in projections
    ]
    acc = accumulation_dtype(x.dtype)
    return ys + [x.new_empty(M, j.lora_A.shape[0], dtype=acc if keeps_p(j) else x.dtype) for j in projections]


def _backward(
    dys: list[Tensor],
    x: Tensor | None,
    kept: list[Tensor],
    dtype: torch.dtype,
    need_x: bool,
    needs: list[bool],
    tensors: list[Tensor],
    given: list[bool],
    backend: str,
) -> list[Tensor]:
    projections = unpack_projections(tensors, given)
    like = dys[0].new_empty(0, dtype=dtype).expand(*dys[0].shape[:-1], 0)  # what forward chose by
    chosen = _choose_operator(like, projections, backend).backend
    grads = run_backward(dys, x, kept, dtype, need_x, _unpack_needs(needs), projections, chosen)
    return [dys[0].new_empty(0) if g is None else g.contiguous() for g in grads]


def _backward_fake(
    dys: list[Tensor],
    x: Tensor | None,
    kept: list[Tensor],
    dtype: torch.dtype,
    need_x: bool,
    needs: list[bool],
    tensors: list[Tensor],
    given: list[bool],
    backend: str,
) -> list[Tensor]:
    dy, projections = dys[0], unpack_projections(tensors, given)
    like = [dy.new_empty(*dy.shape[:-1], projections[0].lora_A.shape[1], dtype=dtype)]
    for j in projections:
        like += [j.weight, j.lora_A, j.lora_B, j.routing, j.gate, j.bias, j.scaling]
    wanted = [need_x, *needs]
    return [t.new_empty(t.shape) if want else dy.new_empty(0) for t, want in zip(like, wanted, strict=True)]


routed_lora = define_operator(
    "routed_lora(Tensor x, Tensor[] tensors, bool[] given, str backend) -> Tensor[]", _forward, _forward_fake
)
routed_lora_backward = define_operator(
    "routed_lora_backward(Tensor[] dys, Tensor? x, Tensor[] kept, ScalarType dtype, bool need_x, bool[] needs, "
    "Tensor[] tensors, bool[] given, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
