"""backend="native" beside the rest of torch: compiled, checkpointed, transformed; when it is taken, what it refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from native import NAMES, RAN, TYPES, built, native, plain
from strategies import call, dy_for, laid_out
from torch.utils.checkpoint import checkpoint

import clora_kernels as ck
from clora_kernels import RoutedLoRA, routed_lora_delta, routed_lora_linear, routed_lora_linear_group
from clora_kernels.kernels.routed_lora import layer
from clora_kernels.testing import assert_parity, dispatched, evaluate


@built
@pytest.mark.parametrize(
    ("dtypes", "backend"), [*((dtypes, "native") for dtypes in TYPES), ("bf16+fp32", "auto"), ("fp16+fp32", "auto")]
)
@pytest.mark.parametrize("M", [2, 21])
def test_compiled_equals_eager(M, dtypes, backend):
    torch._dynamo.reset()
    inputs = plain((M,), dtypes, dropout_p=0.3, scaling=None)
    dy, fn = dy_for(inputs), partial(routed_lora_linear, backend=backend)
    traced = torch.compile(fn, fullgraph=True, backend="aot_eager")
    with dispatched() as ran:
        eager, compiled = evaluate(fn, inputs, dy, NAMES), evaluate(traced, inputs, dy, NAMES)
    assert ran == RAN * 2
    assert all(torch.equal(eager[k], compiled[k]) for k in eager)


@built
def test_differentiated_twice_raises():
    x = (inputs := plain())["x"].requires_grad_()
    (dx,) = torch.autograd.grad(native(**inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="routed_lora: double backward is not supported"):
        dx.sum().backward()


@built
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_draw(reentrant):
    inputs = plain(bias=False)
    inputs["lora_A"].requires_grad_()
    x = inputs.pop("x").requires_grad_()

    def step(x):
        return native(x, **inputs, dropout_p=0.5)

    torch.manual_seed(3)
    expected = torch.autograd.grad(step(x).sum(), [x, inputs["lora_A"]])
    torch.manual_seed(3)
    checkpoint(step, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(inputs["lora_A"].grad, expected[1])


@built
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
def test_transforms_and_autocast(dtypes):
    inputs = plain(dtypes=dtypes, dropout_p=0.2)
    dy = dy_for(inputs)
    with dispatched() as ran:
        by_transform = torch.func.grad(lambda A: (native(**{**inputs, "lora_A": A}) * dy).sum())(inputs["lora_A"])
    assert ran == RAN and torch.equal(by_transform, evaluate(native, inputs, dy, ["lora_A"])["lora_A"])
    half = {**inputs, "x": inputs["x"].bfloat16(), "weight": inputs["weight"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16), dispatched() as ran:
        y = native(**inputs)
    assert ran == RAN[:1] and torch.equal(y, native(**half))


@built
@pytest.mark.parametrize(
    "changed, why",
    [
        ({"routing": torch.eye(5)}, "it has no routing; use 'auto' or 'aten'"),
        ({"gate": torch.ones(5)}, "it has no gate"),
        ({"gate": torch.ones(5), "routing": torch.eye(5)}, "it has no routing and no gate"),
        ({"lora_A": torch.ones(5, 41, dtype=torch.bfloat16)}, "it takes lora_A and lora_B in fp32 and contiguous"),
        ({"lora_A": torch.ones(41, 5).mT}, "it takes lora_A and lora_B in fp32 and contiguous"),
        ({"lora_B": torch.ones(29, 5, dtype=torch.float64)}, "it takes lora_A and lora_B in fp32 and contiguous"),
        ({"lora_B": torch.ones(5, 29).mT}, "it takes lora_A and lora_B in fp32 and contiguous"),
        ({"scaling": torch.tensor(1.0, dtype=torch.float64)}, "it takes an fp32 scaling on the CPU"),
        ({"x": torch.ones(2, 41).double(), "weight": torch.ones(29, 41).double()}, "it is not built for torch.float64"),
    ],
)
def test_named_it_refuses_what_it_lacks(changed, why):
    inputs = {**plain(), **changed}
    with pytest.raises(ValueError, match=f"backend='native' cannot run routed_lora: {why}"):
        native(**inputs)
    assert ck.explain(routed_lora_linear, **inputs).backend in ("aten", "composite"), "auto takes another"
    routed_lora_linear(**inputs)


@built
def test_named_it_refuses_a_group_and_the_adapter_alone():
    inputs = plain()
    j = RoutedLoRA(inputs["weight"], inputs["lora_A"], inputs["lora_B"])
    with pytest.raises(ValueError, match="one projection at a time, not a group"):
        routed_lora_linear_group(inputs["x"], [j, j], backend="native")
    with pytest.raises(ValueError, match="it needs a weight"):
        routed_lora_delta(inputs["x"], inputs["lora_A"], inputs["lora_B"], backend="native")
    (y,) = routed_lora_linear_group(inputs["x"], [j], backend="native")
    assert torch.equal(y, native(inputs["x"], *j[:3]))
    compiled = torch.compile(native, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="it has no gate"):
        compiled(**inputs, gate=torch.ones(5))


@built
def test_auto_takes_it_for_little_work_alone(monkeypatch):
    inputs = plain(dtypes="bf16+fp32")  # 21 tokens, rank 5
    for work, backend in ((21 * 5 * (41 + 29), "native"), (21 * 5 * (41 + 29) - 1, "aten")):
        monkeypatch.setattr(layer, "LITTLE_WORK", work)
        choice = ck.explain(routed_lora_linear, **inputs)
        assert choice.backend == backend
        with dispatched() as ran:
            evaluate(routed_lora_linear, inputs, dy_for(inputs), ["x", "lora_A"])
        assert (ran == RAN) == (backend == "native") and bool(ran)
        assert ("little to compute" in choice.reason) == (backend == "native")
    named = ck.explain(routed_lora_linear, **inputs, backend="native")
    assert (named.backend, named.reason) == ("native", "named by the caller")
    assert ck.explain(routed_lora_linear, **inputs, backend="aten").backend == "aten"


def test_without_the_extension_aten_does_it(mask_path):
    """And named it says so; where it is built both have the same results."""
    inputs = plain(dropout_p=0.3, dtypes="bf16+fp32")
    dy = dy_for(inputs)
    with dispatched() as ran:
        assert_parity(call, inputs, dy=dy)
    assert (ran == RAN) == (mask_path == "compiled")
    if mask_path == "plain":
        assert "routed_lora.aten.linear" in ran
        with pytest.raises(ValueError, match=r"cannot run routed_lora: the compiled part cpu is not there"):
            native(**inputs)


def large_from(monkeypatch, least):
    """From how many elements on a weight is a large one in fp32."""
    for few in (layer._FEW_ROWS_FORWARD, layer._FEW_ROWS_BACKWARD):
        monkeypatch.setitem(few, torch.float32, (few[torch.float32][0], least))


@built
@pytest.mark.parametrize("dtypes, M, forward, backward", [
    ("fp32", 1, 1, 0), ("fp32", 2, 1, 1), ("fp32", 3, 0, 1), ("fp32", 8, 0, 1), ("fp32", 9, 0, 0),
    ("bf16+fp32", 1, 0, 1), ("bf16+fp32", 8, 0, 1), ("bf16+fp32", 9, 0, 0),
    ("fp16+fp32", 1, 0, 1), ("fp16+fp32", 8, 0, 1), ("fp16+fp32", 9, 0, 0),
])  # fmt: skip
def test_few_rows_take_their_own_kernel(dtypes, M, forward, backward, monkeypatch):
    """In fp32 of a weight that lies beyond the caches; there what is of rank r is matmuls of PyTorch."""
    inputs = plain((M,), dtypes)
    own, size = inputs["weight"], inputs["weight"].numel()
    for weight, least in [(own, size), (laid_out(own, "transposed"), size), (own, size + 1)]:
        large_from(monkeypatch, least)
        with torch.profiler.profile(acc_events=True) as profile:
            evaluate(native, {**inputs, "weight": weight}, dy_for(inputs), ["x"])
        called = {event.key: event.count for event in profile.key_averages()}
        counts = weight.is_contiguous() and (least == size or dtypes != "fp32")
        assert called.get("clora_kernels::routed_lora_lay_down", 0) == (dtypes != "fp32")
        assert called.get("clora_kernels::routed_lora_shrink", 0) == (forward and counts)
        assert called.get("clora_kernels::routed_lora_few_rows", 0) == (backward and counts)


@built
@pytest.mark.parametrize("M", [2, 7, 40])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_in_fp32_by_matmuls_or_by_the_compiled_call_it_is_right(M, dropout_p, monkeypatch):
    """Forward and backward, each at the limits of both ways, with few rows of a large weight and without."""
    inputs = plain((M,), dropout_p=dropout_p, scaling=None)
    dy = dy_for(inputs)
    for most, large in (
        (0, 0),
        (0, 1 << 21),
        (M * (41 + 29), 0),
        (M * (41 + 29), 1 << 21),
        (M * (41 + 29) - 1, 1 << 21),
    ):
        monkeypatch.setattr(layer, "_MOST_ELEMENTS", most)
        large_from(monkeypatch, large)
        with torch.profiler.profile(acc_events=True) as profile:
            assert_parity(native, inputs, dy=dy)
        called = {event.key for event in profile.key_averages()}
        assert ("clora_kernels::routed_lora_lay_down" in called) == (most < M * (41 + 29))
    for dropped in (M * 41, M * 41 - 1):
        monkeypatch.setattr(layer, "_MOST_ELEMENTS", 1 << 19)
        monkeypatch.setattr(layer, "_MOST_DROPPED", dropped)
        with torch.profiler.profile(acc_events=True) as profile:
            assert_parity(native, inputs, dy=dy)
        by_call = "clora_kernels::routed_lora_lay_down" in {event.key for event in profile.key_averages()}
        assert by_call == (dropout_p > 0 and dropped < M * 41)
