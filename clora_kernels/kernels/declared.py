"""Which Triton kernels exist and in which forms they ship: what can be compiled, and judged, without a GPU.

A module that defines kernels lists their compilations in ``COMPILATIONS``; :func:`declared` gathers the lists. Nothing
here imports Triton: the modules that define kernels do.
"""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

__all__ = ["LIMIT", "SHARED_MEMORY", "TESTED_TRITON", "Compilation", "Expects", "declared", "untested"]

TESTED_TRITON = ("3.6", "3.7")
"""The versions of Triton that the kernels are tested with."""

LIMIT = 300
"""Most compilations a package may declare: each takes about half a second for each architecture."""

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory one program may use, for each compute capability that is compiled for."""


@dataclass(frozen=True)
class Expects:
    """What the compiled code must show beyond what every kernel must (no spill, shared memory within the chip's limit).

    The defaults are the strict ones; a kernel without a matmul satisfies them all.

    wgmma: on sm_90 every matmul runs on warp-group instructions, none on ``mma.sync``. False for fp32 that means fp32,
        and for tiles with less than 64 rows.
    single_buffered: the pointer or descriptor arguments that a matmul may read inside its loop without a second buffer
        in shared memory; every other operand must have two at least, filled by asynchronous copies.
    tf32: tf32 instructions are intended.
    """

    wgmma: bool = True
    single_buffered: tuple[str, ...] = ()
    tf32: bool = False


@dataclass(frozen=True)
class Compilation:
    """One form in which a Triton kernel ships.

    kernel: the ``triton.jit`` function.
    signature: the type of every argument that is not constant, as Triton writes it: "*bf16", "i32",
        "tensordesc<bf16[128, 64]>"; of a tuple, a tuple of the types of its entries, with the value of one that is
        constant in its place.
    constants: the value of every other argument, the ``tl.constexpr`` ones among them.
    unaligned: arguments that are not multiples of 16 (a pointer: of 16 bytes); all others are compiled as if they were.
    architectures: the compute capabilities this form is for.
    options: further options of Triton's compiler.

    Raises ValueError where the arguments of ``kernel`` are not exactly those of ``signature`` and ``constants``, where
    ``unaligned`` or ``expects.single_buffered`` names no argument of ``signature``, or where an architecture has no
    entry in ``SHARED_MEMORY``.
    """

    kernel: Any
    signature: Mapping[str, str | tuple[Any, ...]]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    expects: Expects = Expects()
    unaligned: tuple[str, ...] = ()
    architectures: tuple[int, ...] = (80, 90)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted, got = sorted(self.kernel.arg_names), sorted([*self.signature, *self.constants])
        if got != wanted:
            raise ValueError(f"signature, constants: got {got}, expected each argument of {self.name} once, {wanted}")
        for where, names in (("unaligned", self.unaligned), ("expects.single_buffered", self.expects.single_buffered)):
            if unknown := sorted({*names} - {*self.signature}):
                raise ValueError(f"{where}: got {unknown}, expected arguments of {self.name} in its signature")
        if not self.architectures or not {*self.architectures} <= {*SHARED_MEMORY}:
            raise ValueError(f"architectures: got {self.architectures}, expected some of {sorted(SHARED_MEMORY)}")

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def tile(self) -> str:
        """The constants and the launch options in one line."""
        shape = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{shape} warps={self.num_warps} stages={self.num_stages}".strip()


def untested(version: str) -> str:
    """What to say of a ``version`` of Triton that is none of ``TESTED_TRITON``; empty for one of these."""
    tested = ".".join(version.split(".")[:2]) in TESTED_TRITON
    return "" if tested else f"which is not tested: {' and '.join(TESTED_TRITON)} are"


def declared(package: str = __name__.rpartition(".")[0]) -> list[Compilation]:
    """The ``COMPILATIONS`` of ``package`` and all modules in it, in the order of module names.

    Raises ValueError if there are more than ``LIMIT``, or if a kernel of the package is neither declared nor called by
    one that is; RuntimeError under ``TRITON_INTERPRET=1``, where kernels cannot be compiled; ImportError if a module
    cannot be imported, as without Triton.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET: got 1, expected it unset: under the interpreter kernels are not compiled")
    modules = _modules(package)
    compilations = [c for module in modules for c in getattr(module, "COMPILATIONS", ())]
    if len(compilations) > LIMIT:
        raise ValueError(f"COMPILATIONS: got {len(compilations)} in {package}, expected {LIMIT} at most")
    if missing := _undeclared(modules, compilations):
        raise ValueError(f"COMPILATIONS: got none for {', '.join(missing)}, expected one for each Triton kernel")
    return compilations


def _modules(package: str) -> list[ModuleType]:
    root = importlib.import_module(package)
    found = pkgutil.walk_packages(getattr(root, "__path__", []), package + ".")
    return [root, *(importlib.import_module(info.name) for info in found)]


def _undeclared(modules: Iterable[ModuleType], compilations: Iterable[Compilation]) -> list[str]:
    """Names of the Triton functions that no declared kernel is or calls."""
    jit = sys.modules.get("triton.runtime.jit")
    if jit is None:
        return []
    functions = {}
    for value in [value for module in modules for value in vars(module).values()]:
        while isinstance(value, jit.KernelInterface) and not isinstance(value, jit.JITFunction):
            value = value.fn  # inside triton.heuristics or triton.autotune
        if isinstance(value, jit.JITFunction):
            functions[value.__name__] = value
    waiting = [compilation.name for compilation in compilations]
    while waiting:
        function = functions.pop(waiting.pop(), None)
        if function is not None:
            names = ast.walk(function.parse())
            waiting += [node.id if isinstance(node, ast.Name) else getattr(node, "attr", "") for node in names]
    return sorted(functions)
