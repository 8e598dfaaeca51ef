"""Launches that pass Triton by: the same kernel with the same arguments as Triton chooses, or Triton's own launch."""

from __future__ import annotations

from itertools import count, permutations
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="it is Triton that is passed by")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from clora_kernels import gram_schmidt, routed_lora_linear
from clora_kernels.kernels import launch as module
from clora_kernels.kernels.launch import Described, cdiv, launch
from clora_kernels.reference.routed_lora_samples import make_inputs

pytestmark = pytest.mark.skipif(not module.KNOWN, reason="with this Triton every launch is Triton's own")

CPU = -1
"""The index of the device of tensors on the CPU, which play tensors on a GPU here."""


class Elsewhere(torch.Tensor):
    """Plays a tensor of device 1."""

    def get_device(self) -> int:
        return 1


def plain_kernel(x_ptr, y_ptr, sizes, pointers, m, scale, desc, A, B):
    pass


def described(t: Any) -> Any:
    """What a launch is told of an argument."""
    if isinstance(t, torch.Tensor):
        return id(t)
    if isinstance(t, tuple):
        return [*map(described, t)]
    return (id(t.base), [*t.shape], [*t.strides], t.padding) if hasattr(t, "block_shape") else t


class Driver:
    """A driver of a GPU that is not there. ``launched``: what it was told, in order."""

    def __init__(self) -> None:
        self.device, self.functions, self.launched = CPU, count(1), []
        self.get_current_device = lambda: self.device
        self.get_current_stream = lambda device: ("stream of", device)
        self.get_current_target = lambda: GPUTarget("cuda", 90, 32)

    def compile(self, source: Any, target: Any, options: dict[str, Any], **_: Any) -> CompiledKernel:
        """A compiled kernel that does nothing but tell ``launched``."""
        kernel = CompiledKernel.__new__(CompiledKernel)
        kernel.src, kernel.name, kernel.module = source, source.name, self
        kernel.function, kernel.packed_metadata = next(self.functions), ("metadata", options["num_warps"])

        def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
            for hook in (enter, leave):
                if hook is not None:
                    hook(launch_metadata)
            assert len(args) == len(source.fn.arg_names)
            constant = [kind == "constexpr" for kind in source.signature.values()]
            passed = [None if c else described(a) for a, c in zip(args, constant, strict=True)]
            self.launched.append(((x, y, z), stream, function, metadata, passed))

        kernel._run = run
        return kernel


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", found)
    monkeypatch.setattr(triton.compiler, "compile", found.compile)
    monkeypatch.setattr(module, "_chosen", {})
    return found


@pytest.fixture
def by_triton(monkeypatch):
    """The kernels Triton launched itself."""
    names, run = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: names.append(self.__name__) or run(self, *a, **k))
    return names


def make_kernel() -> JITFunction:
    annotations = dict.fromkeys("AB", "constexpr")
    plain_kernel.__annotations__ = annotations
    return JITFunction(plain_kernel, do_not_specialize=["m"])


def in_blocks(t: torch.Tensor, block_shape: list[int], transposed: bool = False) -> Described:
    found = Described(t, transposed)
    found.block_shape = block_shape
    return found


STORE = torch.zeros(4096)
ALIGNED, OTHER = STORE[:1024].view(32, 32), STORE[1024:2048].view(32, 32)
OF_4, OF_8 = STORE[2049:3073].view(32, 32), STORE[2050:3074].view(32, 32)
assert STORE.data_ptr() % 16 == 0

PLAIN = (ALIGNED, None, (1, 16), (OTHER, None), 5, 0.5, in_blocks(ALIGNED, [16, 32]))
OPTIONS = {"A": 1, "B": 2, "num_warps": 4}
INTEGERS = [
    0, 1, 2, 8, 15, 16, 17, 24, 2**31 - 1, 2**31 - 16, 2**31, 2**32, 2**63, -1, -16, -(2**31) - 1, True, False
]  # fmt: skip
TENSORS = [ALIGNED, OTHER, ALIGNED.bfloat16(), OF_4, OF_8, ALIGNED.int(), ALIGNED.as_subclass(Elsewhere)]
VALUES = {
    0: TENSORS,
    1: [None, *INTEGERS, *TENSORS],
    2: [3, (3,), *((i,) for i in INTEGERS), (1, 16), (16, 1), (None, 16), (16, 16), ((16, 1), 16), (16, 16, 16)],
    3: [(OTHER, None), (None, OTHER), (OTHER, OTHER), (OTHER.int(), OTHER), (OTHER,), OTHER, (OF_4, None), (None, 1)],
    4: INTEGERS,
    5: [0.5, 1.0, None, 1],
    6: [
        None, ALIGNED, in_blocks(ALIGNED, [16, 32]), in_blocks(OTHER, [16, 32]), in_blocks(OTHER.mT, [16, 32], True),
        in_blocks(ALIGNED, [32, 16]), in_blocks(ALIGNED.bfloat16(), [16, 32]),
    ],
}  # fmt: skip


def with_value(place: int, value: Any) -> tuple[Any, ...]:
    return (*PLAIN[:place], value, *PLAIN[place + 1 :])


def as_triton(driver, kernel, *args, **options) -> None:
    """Launch twice, then as Triton does, which must have been the same."""
    launch(kernel, (3, 2), *args, **options)
    launch(kernel, (3, 2), *args, **options)
    kernel[(3, 2)](*map(module._for_triton, args), **options)
    first, second, expected = driver.launched[-3:]
    assert first == second == expected


@pytest.mark.parametrize("place", VALUES)
def test_a_launch_is_the_one_triton_makes(driver, place):
    """For every pair of values, so that what was chosen for the one could be launched for the other."""
    for pair in permutations(VALUES[place], 2):
        kernel = make_kernel()
        for value in pair:
            as_triton(driver, kernel, *with_value(place, value), **OPTIONS)


def test_where_a_tuple_ends_chooses_the_kernel(driver):
    kernel = make_kernel()
    for sizes, pointers in (((5, 7), (None,)), ((5,), (7, None)), ((5, 7, None), ()), (5, (7, None))):
        as_triton(driver, kernel, *PLAIN[:2], sizes, pointers, *PLAIN[4:], **OPTIONS)


def test_constants_choose_the_kernel(driver):
    kernel = make_kernel()
    for options in (
        {"A": 1, "B": 2}, {"A": 2, "B": 2}, {"A": 2, "B": 1}, {"A": "ieee", "B": 2}, {"A": None, "B": 2}, OPTIONS,
        OPTIONS | {"num_warps": 8}, {"A": 1, "B": 2, "num_stages": 4}, {"B": 1, "A": 2, "num_stages": 4},
    ):  # fmt: skip
        as_triton(driver, kernel, *PLAIN, **options)


def test_kernels_and_devices_are_told_apart(driver, by_triton):
    first, second = make_kernel(), make_kernel()
    there = ALIGNED.as_subclass(Elsewhere)
    for device, tensor in ((CPU, ALIGNED), (1, there), (CPU, ALIGNED), (1, there)):
        driver.device = device
        for kernel in (first, second):
            as_triton(driver, kernel, tensor, None, (1, 16), (None,), 5, 0.5, None, **OPTIONS)
    assert len(by_triton) == 4 + 8, "each chooses once"
    assert len({function for _, _, function, *_ in driver.launched}) == 4


def test_triton_chooses_once_for_a_kind_of_arguments(driver, by_triton):
    kernel = make_kernel()
    launch(kernel, (7,), *PLAIN, **OPTIONS)
    assert by_triton == ["plain_kernel"]
    others = (OTHER, None, (1, 48), (ALIGNED, None), 7, 1.5, in_blocks(OTHER, [16, 32]))
    for args, grid in ((PLAIN, (7,)), (others, (1, 2)), (PLAIN, (1, 2, 3))):
        launch(kernel, grid, *args, **OPTIONS)
    assert len(by_triton) == 1
    assert [launched[:3] for launched in driver.launched[1:]] == [
        ((7, 1, 1), ("stream of", CPU), 1), ((1, 2, 1), ("stream of", CPU), 1), ((1, 2, 3), ("stream of", CPU), 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, OF_4), (0, OF_8), (0, ALIGNED.as_subclass(Elsewhere)), (3, (OF_8,)), (4, 2**31), (4, -16), (2, (1, 2**31)),
     (4, True), (2, ((1,), 2)), (2, (True, 16))],
)  # fmt: skip
def test_what_is_rare_is_launched_by_triton_each_time(driver, by_triton, place, value):
    kernel = make_kernel()
    for _ in range(3):
        launch(kernel, (1,), *with_value(place, value), A=1, B=2)
    assert len(by_triton) == 3 and not module._chosen


def test_triton_judges_a_description_that_is_not_aligned(driver, by_triton):
    kernel = make_kernel()
    launch(kernel, (1,), *PLAIN, A=1, B=2)
    with pytest.raises(AssertionError, match="16-byte aligned"):
        launch(kernel, (1,), *with_value(6, in_blocks(OF_8, [16, 32])), A=1, B=2)
    assert len(by_triton) == 1


def test_who_listens_hears_every_launch(driver, by_triton, monkeypatch):
    kernel, heard = make_kernel(), []
    runtime = triton.knobs.runtime

    def listened(**options) -> int:
        before = len(by_triton)
        launch(kernel, (1,), *PLAIN, A=1, B=2, **options)
        return len(by_triton) - before

    assert [listened(), listened()] == [1, 0]
    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        chain.add(heard.append)
        assert listened() == 1
        chain.remove(heard.append)
        assert listened() == 0
    assert [metadata.get()["name"] for metadata in heard] == ["plain_kernel"] * 2
    kernel.pre_run_hooks.append(lambda *args, **options: heard.append("before"))
    assert listened() == 1 and heard.pop() == "before"
    kernel.pre_run_hooks.clear()
    for where, name, value in (
        (runtime, "launch_enter_hook", None), (runtime, "launch_exit_hook", print), (runtime, "debug", True),
        (triton.knobs.compilation, "instrumentation_mode", "x"), (kernel, "debug", True), (module, "KNOWN", False),
        (runtime, "add_stages_inspection_hook", lambda: ("key", "hash")),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert listened() == 1, name
        assert listened() == 0, name


def test_what_is_not_compiled_yet_is_not_kept(driver, by_triton, monkeypatch):
    kernel, compile_now = make_kernel(), driver.compile
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: by_triton.append(SimpleNamespace(result=compile_now)))
    for _ in range(2):
        launch(kernel, (1,), *PLAIN, A=1, B=2)
    assert len(by_triton) == 2 and not module._chosen


def test_a_description_is_what_triton_makes_of_it():
    t = torch.zeros(32, 64)
    for stated, shape in ((in_blocks(t, [16, 32]), [32, 64]), (in_blocks(t.mT, [16, 32], True), [32, 64])):
        made = module._for_triton(stated)
        assert made.base is stated.base and made.block_shape == [16, 32] and made.padding == stated.padding == "zero"
        assert made.shape == stated.shape == shape and made.strides == stated.strides == [64, 1]


def test_what_tma_takes():
    assert Described(ALIGNED).fits() and Described(ALIGNED.mT, True).fits()
    assert Described(STORE.view(64, 64)[:, 8:20]).fits()
    for wrong in (
        ALIGNED.mT, STORE.view(64, 64)[:, ::2], STORE[:0].view(0, 16), STORE[:0].view(16, 0), OF_8,
        STORE[:3072].view(32, 96)[:, 1:], STORE[: 32 * 30].view(32, 30), ALIGNED[:1].expand(4, 32),
    ):  # fmt: skip
        assert not Described(wrong).fits()
    assert not Described(ALIGNED, True).fits()


def test_cdiv():
    assert [cdiv(a, 4) for a in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes", [((4, 64), 128, 256, 16), ((3, 17), 67, 41, 5)], ids=["by descriptors", "by pointers"]
)
def test_on_a_gpu_results_are_those_of_triton_s_own_launch(by_triton, monkeypatch, sizes):
    """Bit for bit, also in a graph; aligned calls come to Triton once, those that are not every time."""
    monkeypatch.setattr(module, "_chosen", {})
    inputs = make_inputs(*sizes, dtype=torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.2, device="cuda")
    V = torch.randn(5, 300, 20, device="cuda")

    def call() -> list[torch.Tensor]:
        return [routed_lora_linear(**inputs, backend="triton"), *gram_schmidt(V, backend="triton")]

    expected = call()
    assert {"pack_kernel", "inner_kernel"} <= set(by_triton)
    by_triton.clear()
    again = call()
    assert not {"inner_kernel", "step_kernel"} & set(by_triton)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call()
    graph.replay()
    for one, two, three in zip(expected, again, replayed, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
