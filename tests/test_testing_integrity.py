"""Planted faults for the guards of memory and for the records of what ran; what a call costs in memory."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from strategies import LAYOUTS, laid_out, tensors

from clora_kernels import routed_lora_linear
from clora_kernels.kernels import routed_lora as routed_lora_kernels
from clora_kernels.kernels.routed_lora import aten
from clora_kernels.library import LIBRARY
from clora_kernels.reference.routed_lora_samples import make_inputs
from clora_kernels.testing import (
    dispatched,
    guarded,
    guarded_outputs,
    launches,
    peak_memory,
    poisoned_empty,
    saved_tensors,
    unchanged,
)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[1].add_(1),
        lambda t: t.untyped_storage().__setitem__(0, 77),
        lambda t: t.t_(),
        lambda t: t.requires_grad_(),
        lambda t: t.set_(t.clone()[:, :2]),
    ],
    ids=["value", "between the elements", "strides", "requires_grad", "shape"],
)
def test_unchanged_sees_every_change(device, change):
    other, t = torch.ones(3, device=device), torch.arange(48.0, device=device).view(6, 8)[:4, 1::2]
    with unchanged(other, t):
        assert (t * 2 + other[0]).sum() > 0
    with pytest.raises(AssertionError, match=r"tensor 1 of shape"), unchanged(other, t):
        change(t)


class Saver(torch.autograd.Function):
    """x², which saves x and a copy of it, and overwrites the copy in backward if told so."""

    @staticmethod
    def forward(ctx, x, overwrite):
        ctx.overwrite = overwrite
        ctx.save_for_backward(x, x.clone())
        return x * x

    @staticmethod
    def backward(ctx, dy):
        x, copy = ctx.saved_tensors
        if ctx.overwrite:
            copy.data.zero_()
        return 2 * x * dy, None


def test_saved_tensors_lists_them_and_sees_that_one_changes(device):
    x, unrelated = torch.randn(5, 3, device=device, requires_grad=True), torch.randn(5, 3, device=device)
    with saved_tensors() as saved:
        y = Saver.apply(x, False)
    assert saved.numel == [15, 15] and saved.holds(x) and not saved.holds(unrelated)
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    with saved_tensors():
        y = Saver.apply(x, True)
    y.sum().backward(retain_graph=True)
    with pytest.raises(AssertionError, match="saved tensor"):
        y.sum().backward()
    with saved_tensors():
        y = Saver.apply(x, False)
    x.data.add_(1)
    with pytest.raises(AssertionError, match="saved tensor"):
        y.sum().backward()


@pytest.fixture
def forgetful():
    """An operator, in Python as those of the package, that leaves its last output element unwritten."""
    fragment = torch.library.Library("clora_kernels_test", "FRAGMENT")
    fragment.define("forgetful(Tensor x) -> Tensor")

    def implementation(x):
        out = x.new_empty(x.shape)
        out[:-1] = x[:-1]
        return out

    for key in ("CPU", "CUDA"):
        fragment.impl("forgetful", implementation, key)
    yield torch.ops.clora_kernels_test.forgetful
    fragment._destroy()


def test_poison_reaches_what_an_operator_leaves_unwritten(device, forgetful):
    x = torch.arange(4.0, device=device)
    with poisoned_empty():
        y = forgetful(x)
        integers = torch.empty(3, dtype=torch.int32, device=device)
        alike = [torch.empty_like(x), x.new_empty(2), torch.empty_strided((2,), (2,)), torch.empty(2).resize_(9)]
    assert torch.equal(y[:-1], x[:-1]) and y[-1].isnan()
    assert (integers == torch.iinfo(torch.int32).max).all() and all(t.isnan().all() for t in alike)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_guarded_keeps_values_and_strides_and_moves_the_pointer(device, layout, offset):
    t = laid_out(torch.randn(3, 5, device=device), layout).requires_grad_()
    with guarded(t, offset) as g:
        assert torch.equal(g, t) and g.stride() == t.stride() and g.requires_grad
        assert g.data_ptr() % 16 == (4 * offset) % 16
        with torch.no_grad():
            g[:1].mul_(1)


@pytest.mark.parametrize("place", [-1, 15])
def test_guarded_sees_one_element_beyond_either_end(device, place):
    t = torch.zeros(3, 5, device=device)
    with pytest.raises(AssertionError, match="4 bytes were written " + ("before" if place < 0 else "after")):
        with guarded(t) as g:
            g.as_strided((1,), (1,), g.storage_offset() + place).view(torch.int32).bitwise_not_()


def test_guarded_outputs_sees_what_an_operator_writes_beyond_its_output(device):
    def correct(x):
        return torch.zeros_like(x).copy_(x)

    def overrun(x):
        out = x.new_empty(x.shape)
        out.as_strided((x.numel() + 1,), (1,), out.storage_offset()).fill_(7)
        return out

    x = torch.randn(4, 6, device=device)
    with guarded_outputs() as outputs:
        assert torch.equal(correct(x), x)
        assert torch.zeros(3, device=device).sum() == 0
    assert [t.shape for t in outputs] == [(4, 6), (3,)]
    with pytest.raises(AssertionError, match="written after"), guarded_outputs():
        overrun(x)
    assert torch.empty is torch.empty and torch.Tensor.new_empty.__name__ == "new_empty"


def test_dispatched_names_every_primitive_in_order(device):
    inputs = make_inputs(device=device)
    with dispatched() as calls:
        routed_lora_linear(**inputs, backend="aten")
    assert calls == ["routed_lora.aten.pack", "routed_lora.aten.shrink", "routed_lora.aten.linear"]
    with dispatched() as calls:
        routed_lora_linear(**inputs, backend="reference")
    assert calls == []
    assert routed_lora_kernels.aten is aten and aten.shrink.__module__ == aten.__name__
    assert not hasattr(aten.shrink, "__wrapped__"), "the record must leave no trace"
    assert LIBRARY.ns == "clora_kernels"


def test_launches_names_the_kernels(device, monkeypatch):
    triton = pytest.importorskip("triton", minversion="3.6")
    import triton.language as tl

    monkeypatch.setattr(triton.knobs.runtime, "interpret", device.type == "cpu")

    @triton.jit
    def doubled(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)

    x = torch.randn(37, device=device)
    y = torch.empty_like(x)
    doubled[(3,)](x, y, 37, BLOCK=16)
    with launches() as names:
        assert names == []
        for _ in range(2):
            doubled[(3,)](x, y, 37, BLOCK=16)
    doubled[(3,)](x, y, 37, BLOCK=16)
    assert names == ["doubled", "doubled"] and torch.equal(y, 2 * x)


def test_launches_hears_the_launch_hook_of_compiled_kernels():
    knobs = pytest.importorskip("triton.knobs")
    from triton.compiler.compiler import LazyDict

    with launches() as names:
        knobs.runtime.launch_enter_hook(LazyDict({"name": "linear_kernel"}))
    knobs.runtime.launch_enter_hook(LazyDict({"name": "after"}))
    assert names == ["linear_kernel"]


def test_launches_says_that_triton_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="needs triton"), launches():
        pass


@given(tensors())
def test_strategies_bring_real_tensors(t):
    """Every layout is a readable view of fp32 numbers, none of the NaN between its elements."""
    assert t.dtype == torch.float32 and t.numel() > 0 and not t.isnan().any()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("contiguous", "offset")])
def test_layouts_are_what_they_say(layout):
    t = torch.randn(4, 6)
    odd = laid_out(t, layout)
    assert odd.shape == t.shape and odd.stride() != t.stride()
    assert torch.equal(odd, t if layout != "expanded" else t[:1].expand_as(t))
    with pytest.raises(ValueError, match="layout"):
        laid_out(t, "sideways")


def test_peak_memory_counts_what_is_held_at_once(device):
    x = torch.ones(1 << 18, device=device)

    def step():
        a = x + 1
        b = a * 2
        del a
        c = b + 3
        return float(c.sum())

    result, peak = peak_memory(step, device)
    assert result == 7 * (1 << 18)
    assert 2 * (1 << 20) <= peak < 2 * (1 << 20) + 65536
    with pytest.raises(ValueError, match="device: got 'meta'"):
        peak_memory(step, "meta")
