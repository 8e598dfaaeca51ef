"""What runs here and why: ``info()`` for the installation, ``explain()`` for one call."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import extension
from .autograd import gram_schmidt, rank1_experts, routed_lora
from .autograd.dropout_mask import check_mask, dropout_mask
from .autograd.gram_schmidt.functions import explain_call as explain_gram_schmidt
from .autograd.rank1_experts.functions import explain_call as explain_rank1_experts
from .autograd.routed_lora.functions import explain_call
from .dispatch import routed_lora as routed_lora_dispatch
from .dispatch.choice import Choice
from .kernels.declared import untested
from .kernels.routed_lora import tables
from .modules.rank1_experts import Rank1ExpertLinear
from .modules.routed_lora import RoutedLoRALinear

_FUNCTIONS = (
    routed_lora.routed_lora_linear,
    routed_lora.routed_lora_linear_group,
    routed_lora.routed_lora_delta,
    dropout_mask,
)
_GRAM_SCHMIDT = (gram_schmidt.gram_schmidt, gram_schmidt.gram_schmidt_foreach, gram_schmidt.orthonormal_basis)
_EXPLAINED = (*_FUNCTIONS, *_GRAM_SCHMIDT, rank1_experts.rank1_experts)
_MERGED = Choice("aten", "F.linear on the merged weight", "the layer is merged")


@dataclass(frozen=True)
class Availability:
    """One backend or compiled part: whether it can be used, and why, or why not."""

    name: str
    available: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name:<24} {'yes' if self.available else 'no ':<4} {self.reason}"


@dataclass(frozen=True)
class Info:
    """Versions, devices, compiled parts, the backends of each operation, and the tables of tiles that were found."""

    versions: dict[str, str]
    devices: list[str]
    parts: list[Availability]
    backends: dict[str, list[Availability]]
    tables: list[Availability]

    def __str__(self) -> str:
        lines = [f"{name:<24} {version}" for name, version in self.versions.items()]
        lines += [f"{'device':<24} {device}" for device in self.devices]
        lines += ["", "compiled parts"] + [str(part) for part in self.parts]
        for operation, backends in self.backends.items():
            lines += ["", operation] + [str(backend) for backend in backends]
        if self.tables:
            lines += ["", "tables of tiles"] + [str(table) for table in self.tables]
        else:
            made = "on a GPU `python -m clora_kernels tune` makes one"
            lines += ["", f"tables of tiles: none in {tables.user_folder()}; {made}"]
        return "\n".join(lines)


def info() -> Info:
    """What is installed, built and available here and, for each thing that is not, why. Prints as a table; never
    raises."""
    parts = [Availability(p.name, p.state == "loaded", f"{p.state}: {p.detail}") for p in extension.status()]
    backends = {"routed_lora": _routed_lora(), "gram_schmidt": _gram_schmidt()}
    backends |= {"rank1_experts": _rank1_experts(), "dropout_mask": _dropout_mask()}
    return Info(_versions(), _devices(), parts, backends, _tables())


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which backend and strategy the call ``fn(*args, **kwargs)`` takes, and why. Checks the arguments, runs nothing.
    In a graph of torch.compile the operator chooses when it runs, and not "composite" but what comes after it.

    Args:
        fn: ``routed_lora_linear``, ``routed_lora_linear_group``, ``routed_lora_delta``, ``gram_schmidt``,
            ``gram_schmidt_foreach``, ``orthonormal_basis``, ``rank1_experts`` or ``dropout_mask``, or a
            :class:`RoutedLoRALinear` or :class:`Rank1ExpertLinear` with what it would be called with (whose scoring is
            not asked, and so not checked).

    Returns:
        ``backend``, ``strategy`` and ``reason``; prints as a sentence.

    Raises:
        TypeError: another ``fn``; arguments it does not take. ValueError and the like as the call itself would.
    """
    if isinstance(fn, RoutedLoRALinear):
        called_with = inspect.signature(fn.forward).bind(*args, **kwargs).arguments
        if fn.merged:
            fn.check_merged_call(called_with.get("gate"), called_with.get("routing_index"))
            return _MERGED
        return explain_call(routed_lora.routed_lora_linear, fn.call_arguments(**called_with))
    if isinstance(fn, Rank1ExpertLinear):
        x = inspect.signature(fn.forward).bind(*args, **kwargs).arguments["x"]
        fn.check_call(x)
        return _MERGED if fn.merged else explain_rank1_experts(fn.arguments_without_choice(x))
    if fn not in _EXPLAINED:
        known = ", ".join(f.__name__ for f in _EXPLAINED)
        raise TypeError(f"fn: got {fn!r}, expected one of {known}, a RoutedLoRALinear or a Rank1ExpertLinear")
    bound = inspect.signature(fn).bind(*args, **kwargs)
    bound.apply_defaults()
    if fn is dropout_mask:
        check_mask(**bound.arguments)
        return _explain_mask(bound.arguments["x"])
    if fn in _GRAM_SCHMIDT:
        return explain_gram_schmidt(fn, bound.arguments)
    if fn is rank1_experts.rank1_experts:
        return explain_rank1_experts(bound.arguments)
    return explain_call(fn, bound.arguments)


def _versions() -> dict[str, str]:
    from . import __version__

    # Of torch what it says itself: package metadata may lack the build, as in 2.11.0+cu130.
    versions = {"python": platform.python_version(), "clora_kernels": __version__, "torch": torch.__version__}
    for name in ("triton", "numpy", "peft", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
        else:
            if name == "triton" and (note := untested(versions[name])):
                versions[name] += f", {note}"
    return versions


def _devices() -> list[str]:
    found = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    if not torch.cuda.is_available():
        why = "this torch has no CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        return [*found, f"cuda: none, {why}"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i}: {properties.name}, sm_{properties.major}{properties.minor}")
    return found


def _routed_lora() -> list[Availability]:
    composite = "matmuls that ATen differentiates, plain calls in fp32 and fp64; any device"
    operators = _backends("routed_lora_lay_down", "compiled operators, plain layers on a CPU")
    return [Availability("composite", True, composite), *operators]


def _gram_schmidt() -> list[Availability]:
    return _backends("gram_schmidt_sweeps", "compiled operators on a CPU; fp32, bf16, fp16")


def _backends(compiled: str, native: str) -> list[Availability]:
    """Those of an operation whose compiled part holds the operator ``compiled``, which ``native`` describes."""
    missing = {}
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if reason := routed_lora_dispatch.why_not_triton(torch.float32, device_type, None):
        missing["triton"] = reason
    if not extension.has_op(compiled, "cpu"):
        missing["native"] = "the compiled part cpu is not there: see above"
    there = {
        "reference": "plain PyTorch, any device",
        "aten": "ATen matmuls, any device",
        "triton": "fused kernels; fp32, bf16, fp16 "
        + ("on CUDA tensors" if device_type == "cuda" else "in Triton's interpreter, for proof and not for speed"),
        "native": native,
    }
    return [Availability(name, name not in missing, missing.get(name, reason)) for name, reason in there.items()]


def _rank1_experts() -> list[Availability]:
    found = [Availability("reference", True, "plain PyTorch, which copies the chosen rows; any device")]
    found += [Availability("aten", True, "ATen, any device")]
    return found + _compiled("rank1_experts_shrink")


def _tables() -> list[Availability]:
    """Each file of tables and, where no device here can use it, why."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    stamps = [stamp for device in devices if (stamp := tables.stamp_of(device))]
    found = []
    for file in tables.files():
        problem = file.problem
        if file.table is not None and file.table.stamp is not None:
            reasons = [file.table.stamp.why_not(stamp) for stamp in stamps] or ["its kernels do not run here"]
            problem = "" if "" in reasons else reasons[0]
        found.append(Availability(file.path.name, not problem, problem or str(file.table)))
    return found


def _dropout_mask() -> list[Availability]:
    return [Availability("reference", True, "plain PyTorch, any device"), *_compiled("dropout_mask")]


def _compiled(operator: str) -> list[Availability]:
    """Whether an operator is compiled, for each device."""
    found = []
    for device_type in ("cpu", "cuda"):
        built = extension.has_op(operator, device_type)
        reason = "compiled operator" if built else f"the compiled part {device_type} is not there: see above"
        found.append(Availability(f"native ({device_type})", built, reason))
    return found


def _explain_mask(x: torch.Tensor) -> Choice:
    if extension.has_op("dropout_mask", x.device.type):
        return Choice("native", "compiled operator", f"it is built for {x.device.type}")
    return Choice("reference", "plain PyTorch, the same bits", f"nothing is compiled for {x.device.type}")
