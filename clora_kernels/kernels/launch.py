"""How Triton kernels are launched: as Triton does it, at less than half of what that costs the host.

Before every launch Triton finds out what the arguments are, to choose the kernel that was compiled for such arguments,
which may take longer than a small layer computes. ``launch`` lets Triton choose once and remembers the choice under a
key at least as fine as Triton's own: the device, for each argument None, its type, the dtype of a pointer and
of an integer whether it is 1 and whether it is a multiple of 16, and all constants. Whatever is not covered by that key
goes Triton's way, each time: a pointer or an integer that is rare, a tensor of another device, hooks, debugging.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .declared import untested

KNOWN = not untested(triton.__version__)
"""Whether this is a Triton whose compiled kernels take the arguments that are passed here."""

_runtime, _compilation = triton.knobs.runtime, triton.knobs.compilation
_chosen: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. ``triton.cdiv``, made for kernels, takes microseconds."""
    return -(-a // b)


class Described:
    """A matrix that a kernel reads or writes in blocks, by TMA, transposed or as it is: what a launch asks of Triton's
    ``TensorDescriptor``, which is made, and checked, where Triton launches. ``block_shape`` is set before a launch."""

    __slots__ = ("base", "block_shape", "shape", "strides")
    block_shape: list[int]
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, base: Tensor, transposed: bool = False) -> None:
        step = -1 if transposed else 1  # a view of its own would cost a microsecond
        self.base, self.shape, self.strides = base, [*base.shape[::step]], [*base.stride()[::step]]

    def fits(self) -> bool:
        """Whether TMA takes it: the last stride 1, the base and the other stride multiples of 16 bytes."""
        (rows, columns), (row, column), base = self.shape, self.strides, self.base
        there = rows > 0 and 0 < columns <= row
        return there and column == 1 and row * base.itemsize % 16 == 0 and base.data_ptr() % 16 == 0


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``.

    args: the arguments that are not constant: tensors, integers, floats, None, tuples of these, ``Described``.
    options: the ``tl.constexpr`` arguments, which the kernel takes last, and the options of the compiler.
    """
    key = None
    if _is_plain(kernel):
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = _key(args, device)
    if key is not None:
        key += (id(kernel), device, *options, *options.values())
        found = _chosen.get(known := tuple(key))
        if found is not None:
            compiled, constants, _ = found
            x, y, z = (*grid, 1, 1)[:3]
            stream = driver.get_current_stream(device)
            function, metadata = compiled.function, compiled.packed_metadata
            compiled.run(x, y, z, stream, function, metadata, None, None, None, *args, *constants)
            return
    compiled = kernel[grid](*map(_for_triton, args), **options)
    if key is not None and type(compiled) is CompiledKernel:  # not a promise of one
        # The kernel is kept, for the id of one that is gone may become another's.
        _chosen[known] = compiled, (None,) * (len(kernel.arg_names) - len(args)), kernel


def _is_plain(kernel: Any) -> bool:
    """Whether a launch is only a launch: nobody listens, and nothing but arguments decides how kernels are compiled."""
    try:
        return KNOWN and type(kernel) is JITFunction and not (
            kernel.pre_run_hooks or kernel.debug or _runtime.debug or _compilation.instrumentation_mode
            or getattr(_runtime, "add_stages_inspection_hook", None)
            or _runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls
        )  # fmt: skip
    except AttributeError:  # a hook that is no chain
        return False


def _key(args: tuple[Any, ...], device: int) -> list[Any] | None:
    """What Triton asks of the arguments; None where one is of a kind that the key does not tell from others."""
    key: list[Any] = []
    flat: list[Any] = []
    for a in args:
        if type(a) is tuple:
            key.append(len(a))
            flat += a
        else:
            key.append(None)
            flat.append(a)
    addresses = integers = 0
    for a in flat:
        kind = type(a)
        if kind is int:
            integers |= a
            key.append(2 if a == 1 else a & 15 == 0)
        elif a is None:
            key.append(None)
        elif kind is Tensor or isinstance(a, Tensor):
            if a.get_device() != device:
                return None
            addresses |= a.data_ptr()
            key.append(a.dtype)
        elif kind is float:
            key.append(float)
        elif kind is Described:
            addresses |= a.base.data_ptr()
            key.append((a.base.dtype, *a.block_shape))
        else:
            return None
    return None if addresses & 15 or integers >> 31 else key  # nor negative integers


def _for_triton(argument: Any) -> Any:
    if type(argument) is Described:
        return TensorDescriptor(argument.base, argument.shape, argument.strides, argument.block_shape)
    return argument
