"""What really ran: the Triton kernels that were launched, the backend primitives that were called."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from .. import kernels


@contextmanager
def launches() -> Iterator[list[str]]:
    """Names of the Triton kernels launched in the block, in order, compiled or under Triton's interpreter.

    Launches replayed by a CUDA graph never pass Triton and are not seen. Raises RuntimeError without triton.
    """
    try:
        from triton import knobs
        from triton.runtime import interpreter
    except ImportError as error:
        raise RuntimeError("launches() records Triton kernels and needs triton >= 3.6: not installed") from error
    names: list[str] = []

    def on_launch(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    run = interpreter.GridExecutor.__call__

    @functools.wraps(run)
    def interpreted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    knobs.runtime.launch_enter_hook.add(on_launch)
    try:
        with mock.patch.object(interpreter.GridExecutor, "__call__", interpreted):
            yield names
    finally:
        knobs.runtime.launch_enter_hook.remove(on_launch)


@contextmanager
def dispatched() -> Iterator[list[str]]:
    """What backends did in the block, in order, as ``"routed_lora.aten.shrink"``: op, module of the backend, function.

    A backend brings the methods of the protocol ``Primitives`` in its op's ``kernels.<op>.algebra``, or in a module
    ``layer`` the whole of it, ``forward`` and ``backward``, or in a module ``composite`` its ``forward``.
    """
    calls: list[str] = []
    with ExitStack() as stack:
        for op in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
            if op.ispkg:
                for backend, names in _backends(op.name):
                    for name in names:
                        label = f"{backend.__name__.removeprefix(f'{kernels.__name__}.')}.{name}"
                        stack.enter_context(
                            mock.patch.object(backend, name, _recording(getattr(backend, name), label, calls))
                        )
        yield calls


def _recording(primitive: Callable[..., Any], label: str, calls: list[str]) -> Callable[..., Any]:
    @functools.wraps(primitive)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(label)
        return primitive(*args, **kwargs)

    return call


def _backends(op: str) -> Iterator[tuple[ModuleType, list[str]]]:
    """The modules of an op's folder that bring its primitives, or the whole of it, and the names of those."""
    package = importlib.import_module(op)
    protocol = importlib.import_module(f"{op}.algebra").Primitives
    names = [name for name, _ in inspect.getmembers(protocol, inspect.isfunction) if not name.startswith("_")]
    for found in pkgutil.iter_modules(package.__path__, f"{op}."):
        try:
            module = importlib.import_module(found.name)
        except ImportError:  # a backend whose compiler is not installed cannot be called either
            continue
        if all(inspect.isfunction(getattr(module, name, None)) for name in names):
            yield module, names
        elif found.name == f"{op}.layer":
            yield module, ["forward", "backward"]
        elif found.name == f"{op}.composite":  # ATen has its backward
            yield module, ["forward"]
