"""Compiles the declared Triton kernels for GPUs that need not be there, and judges what came out.

    python -m clora_kernels kernels [--package clora_kernels.kernels] [--json]

prints a line for each kernel and architecture: dtypes, registers, spilled bytes, shared memory, instructions, buffers;
and ends with status 1 if one fails: it does not compile, spills, needs more shared memory than the chip has, multiplies
on sm_90 without ``wgmma``, reads an operand in its main loop through a single buffer, or rounds fp32 to tf32.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from . import ttgir
from .declared import SHARED_MEMORY, Compilation, declared, untested

INSTRUCTIONS = ("wgmma.mma_async", "mma.sync", "cp.async.bulk.tensor", "cp.async.cg", "cp.async.ca", ".tf32")
TENSOR_CORES = INSTRUCTIONS[:2]


@dataclass
class Report:
    """One compilation for one architecture. ``dtypes``: those of what its pointers point to; ``failures`` maps each
    check that failed (compile, shared, spill, wgmma, buffers, tf32) to what was found."""

    kernel: str
    tile: str
    architecture: int
    dtypes: str = ""
    failures: dict[str, str] = field(default_factory=dict)
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instructions: list[str] = field(default_factory=list)
    buffers: dict[str, int] = field(default_factory=dict)


def compile_for(compilation: Compilation, architecture: int) -> Any:
    """The compiled kernel: ``asm`` holds ttgir, ptx and cubin. Raises what Triton's compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = compilation.kernel.arg_names
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = dict(compilation.constants)
    aligned = {}
    for i, name in enumerate(names):
        kind = compilation.signature.get(name, "constexpr")
        for place, one in [((i, j), k) for j, k in enumerate(kind)] if isinstance(kind, tuple) else [((i,), kind)]:
            if not isinstance(one, str):
                constants[place] = one
            elif one.startswith(("*", "i", "u")) and name not in compilation.unaligned:
                aligned[place] = [["tt.divisibility", 16]]
        signature[name] = (
            tuple(k if isinstance(k, str) else "constexpr" for k in kind) if isinstance(kind, tuple) else kind
        )
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages, **compilation.options}
    source = ASTSource(compilation.kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def judge(compilation: Compilation, architecture: int) -> Report:
    """Compile, and check what every kernel must show and what this one ``expects``."""
    report = Report(compilation.name, compilation.tile, architecture, _dtypes(compilation))
    try:
        kernel = compile_for(compilation, architecture)
    except Exception as error:  # whatever the compiler raises is the finding
        report.failures["compile"] = f"{type(error).__name__}: {error}"
        return report
    ptx, expects = kernel.asm["ptx"], compilation.expects
    report.registers, report.spilled = resources(kernel.asm["cubin"])
    report.shared = kernel.metadata.shared
    report.instructions = [name for name in INSTRUCTIONS if name in ptx]
    graph = ttgir.Kernel(kernel.asm["ttgir"])
    if report.spilled:
        report.failures["spill"] = f"{report.spilled} bytes a thread in local memory"
    if report.shared > SHARED_MEMORY[architecture]:
        report.failures["shared"] = f"{report.shared} bytes of {SHARED_MEMORY[architecture]}"
    if ".tf32" in ptx and not expects.tf32:
        report.failures["tf32"] = "fp32 operands are rounded to tf32"
    on_warp_groups = "wgmma.mma_async" in ptx and "mma.sync" not in ptx
    if graph.dots and architecture >= 90 and expects.wgmma and not on_warp_groups:
        report.failures["wgmma"] = "a matmul does not use wgmma"
    if not graph.dots and any(name in ptx for name in TENSOR_CORES):
        report.failures["buffers"] = "the matmuls in the PTX are not found in the TTGIR"
    for _, reads in graph.loop_reads():
        for read in sorted(reads, key=str):
            name = _argument(read.argument, compilation)
            report.buffers[name] = min(read.buffers, report.buffers.get(name, read.buffers))
        if not reads:
            report.failures["buffers"] = "what a matmul reads in its loop is not found in the TTGIR"
    single = [name for name, buffers in report.buffers.items() if buffers < 2 and name not in expects.single_buffered]
    if single:
        report.failures["buffers"] = f"a single buffer for {', '.join(sorted(single))} in a loop"
    return report


def _dtypes(compilation: Compilation) -> str:
    """The dtypes of what is pointed to, each once, in the order of the arguments."""
    kinds = [k for kind in compilation.signature.values() for k in (kind if isinstance(kind, tuple) else (kind,))]
    found = [re.match(r"(?:\*|tensordesc<)(\w+)", kind) for kind in kinds if isinstance(kind, str)]
    return " ".join(dict.fromkeys(match[1] for match in found if match))


def _argument(name: str, compilation: Compilation) -> str:
    """The argument of that name in the TTGIR, where the entries of a tuple ``x`` are called x, x_0, x_1, or from Triton
    3.9 on x.0, x.1."""
    return name if name in compilation.signature else re.sub(r"_\d+$", "", name.partition(".")[0])


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack and local memory a thread) of the one kernel in ``cubin``."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bREG:(\d+) STACK:(\d+) .*?\bLOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump: got {usage!r}, expected REG, STACK and LOCAL")
    return int(found[1]), int(found[2]) + int(found[3])


@cache
def _declared(package: str) -> list[Compilation]:
    return declared(package)


def _judge_declared(package: str, position: int, architecture: int) -> Report:
    return judge(_declared(package)[position], architecture)


def judge_all(package: str) -> list[Report]:
    """A report for each declared compilation of ``package`` and each of its architectures, on all cores."""
    work = [(i, a) for i, compilation in enumerate(_declared(package)) for a in compilation.architectures]
    if not work:
        return []
    workers = min(len(os.sched_getaffinity(0)), len(work))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_judge_declared, [package] * len(work), *zip(*work, strict=True)))


HEADER = (
    f"{'kernel':24} {'GPU':5} {'dtypes':20} {'registers':>9} {'spilled':>7} {'shared':>7}  instructions, buffers, tile"
)


def row(report: Report) -> str:
    """A line under ``HEADER``."""
    buffers = " ".join(f"{name}:{count}" for name, count in report.buffers.items())
    instructions = ", ".join(report.instructions)
    return (
        f"{report.kernel:24} sm_{report.architecture} {report.dtypes:20} {report.registers:9} {report.spilled:7} "
        f"{report.shared:7}  {instructions or '-':40} buffers {buffers or '-'}  [{report.tile}]"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--package", default="clora_kernels.kernels", help="where COMPILATIONS are gathered")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")


def run(options: argparse.Namespace) -> int:
    """Print a line for each compilation; returns the exit status: 1 if one failed, or none could be tried."""
    try:
        _declared(options.package)
        import triton
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"{options.package}: {error}", file=sys.stderr)
        return 1
    if note := untested(triton.__version__):
        print(f"triton {triton.__version__}, {note}", file=sys.stderr)
    reports = judge_all(options.package)
    if options.json:
        print(json.dumps([asdict(report) for report in reports]))
    else:
        print(HEADER)
        for report in reports:
            print(row(report))
            for check, finding in report.failures.items():
                print(f"    FAILED {check}: {finding}")
        failed = sum(bool(report.failures) for report in reports)
        print(f"{len(reports)} compilations of {options.package}, {failed} failed")
    return int(any(report.failures for report in reports))
