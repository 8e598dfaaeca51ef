"""Loads the compiled parts of the package and knows what became of each; never raises.

Two parts, each optional: ``cpu``, the Python module ``clora_kernels._C`` (operator schemas and CPU operators), and
``cuda``, the library ``_cuda.so`` beside it (CUDA operators of the same schemas). Importing this module loads them.
"""

import json
import sys
import warnings
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_HERE = Path(__file__).parent
_NAMESPACE = "clora_kernels"
_HOW_TO_BUILD = "build it with `pip install --no-build-isolation .` in the source tree"

CPU_MISSING = "the compiled part cpu is not there (info() tells why)"
"""What a choice says, word for word, where that part would have been chosen."""

# Frames that lie between a user's call and a warning: of this package, of torch, of the graphs that torch makes.
_BETWEEN = (str(_HERE), str(Path(torch.__file__).parent), "<eval_with_key>")
_warned: set[str] = set()


@dataclass(frozen=True)
class Part:
    """What became of one compiled part: ``state`` is "loaded", "not built" or "failed"; ``detail`` tells the file it
    was loaded from, or the reason it was not."""

    name: str
    state: str
    detail: str


def _not_built(name: str, also: str = "") -> Part:
    try:
        reason = json.loads((_HERE / "_build.json").read_text())[name]
    except (OSError, ValueError, KeyError):
        reason = _HOW_TO_BUILD
    return Part(name, "not built", also + reason)


def _load_cpu() -> tuple[Part, ModuleType | None]:
    # In this very folder: an editable install elsewhere on the path would offer the binary of another source tree
    spec = PathFinder.find_spec(f"{_NAMESPACE}._C", [str(_HERE)])
    if spec is None or spec.loader is None:
        others = sorted(path.name for path in _HERE.glob("_C.*.so"))
        return _not_built("cpu", f"{', '.join(others)} is for another interpreter; " if others else ""), None
    try:
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # a broken binary may fail in any way, and must not break the package
        return Part("cpu", "failed", f"{type(error).__name__}: {error}"), None
    sys.modules[spec.name] = module
    return Part("cpu", "loaded", str(module.__file__)), module


def _load_cuda(cpu: Part) -> Part:
    library = _HERE / "_cuda.so"
    if not library.exists():
        return _not_built("cuda")
    if cpu.state != "loaded":
        return Part("cuda", "failed", f"its operators need the schemas of the cpu part, which is {cpu.state}")
    try:
        torch.ops.load_library(str(library))
    except Exception as error:
        return Part("cuda", "failed", str(error.__cause__ or error))  # torch keeps the loader's words in the cause
    return Part("cuda", "loaded", str(library))


def _operators() -> set[str]:
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{_NAMESPACE}::")}


_written_in_python = _operators()
_cpu, _C = _load_cpu()
_cuda = _load_cuda(_cpu)
_kernels = frozenset(
    (name.removeprefix(f"{_NAMESPACE}::"), key.lower())
    for name in _operators() - _written_in_python
    for key in ("CPU", "CUDA")
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
)


def status() -> list[Part]:
    """The compiled parts, cpu then cuda, and what became of each."""
    return [_cpu, _cuda]


def has_op(name: str, device_type: str) -> bool:
    """Whether the compiled operator ``clora_kernels::name`` has a kernel for ``device_type`` ("cpu", "cuda")."""
    return (name, device_type) in _kernels


def warn_once(operation: str, device_type: str) -> None:
    """Warn, the first time in a process, that ``operation`` ("routed_lora") runs without its compiled part."""
    if operation in _warned:
        return
    _warned.add(operation)
    warnings.warn(
        f"clora_kernels has no compiled {operation} for {device_type} and runs it slower on ATen, with the same "
        "results within rounding; to build it run `pip install --no-build-isolation .` in the source tree "
        "(clora_kernels.info() tells why it is missing)",
        RuntimeWarning,
        stacklevel=_level_of_the_user(),
    )


# torch.compile cannot trace a warning, so it is given while tracing. This is what the decorator
# torch.compiler.assume_constant_result does, without its import of the compiler.
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _level_of_the_user() -> int:
    """``stacklevel`` with which :func:`warn_once` points at the line that called this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    return level


def build_info() -> dict[str, Any]:
    """How the cpu part was built: package and torch versions, compiler, flags, CUDA architectures; {} without it."""
    return {} if _C is None else _C.build_info()
