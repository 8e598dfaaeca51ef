"""backend="native", the compiled path of a plain layer: parity, fidelity, gradients, layouts, and what it refuses."""

from __future__ import annotations

from functools import partial
from itertools import chain, combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS, call, dy_for, laid_out, tensors_of
from torch.utils.checkpoint import checkpoint

import clora_kernels as ck
from clora_kernels import RoutedLoRA, extension, routed_lora_delta, routed_lora_linear, routed_lora_linear_group
from clora_kernels.kernels.routed_lora import layer
from clora_kernels.reference.routed_lora_samples import make_inputs
from clora_kernels.testing import (
    assert_fidelity,
    assert_parity,
    dispatched,
    evaluate,
    guarded_outputs,
    poisoned_empty,
    saved_tensors,
    unchanged,
)

built = pytest.mark.skipif(
    not extension.has_op("routed_lora_lay_down", "cpu"), reason=f"not compiled: {extension.status()[0].detail}"
)
native = partial(routed_lora_linear, backend="native")
TYPES = ["fp32", "bf16+fp32", "fp16+fp32"]
RAN = ["routed_lora.layer.forward", "routed_lora.layer.backward"]


def plain(lead=(3, 7), dtypes="fp32", **options):
    dtype, adapter_dtype = DTYPES[dtypes]
    return make_inputs(lead, dtype=dtype, adapter_dtype=adapter_dtype, routing=False, **options)


SIZES = [
    ((0,), 41, 29, 5),
    ((1,), 517, 259, 12),
    ((2,), 131, 517, 4),
    ((7,), 67, 35, 17),
    ((8,), 1030, 33, 8),
    ((1000,), 259, 131, 3),
    ((2, 3, 1, 5), 9, 1, 1),
    ((), 1, 9, 2),
    ((0, 3), 8, 8, 96),
]


@built
@pytest.mark.parametrize("dtypes", TYPES)
@pytest.mark.parametrize("options", [{"bias": False}, {"dropout_p": 0.3, "scaling": None}, {"dropout_p": 1.0}], ids=str)
@pytest.mark.parametrize("lead, K, N, r", SIZES)
def test_parity(lead, K, N, r, options, dtypes):
    inputs = plain(lead, dtypes, K=K, N=N, r=r, **options)
    dy = dy_for(inputs)
    with unchanged(dy, *tensors_of(inputs)), poisoned_empty(), saved_tensors(), dispatched() as ran:
        assert_parity(native, inputs, dy=dy)
    assert ran == RAN


@built
@pytest.mark.parametrize("dtypes", TYPES)
@pytest.mark.parametrize("M", range(1, 10))
def test_each_few_rows(M, dtypes):
    """Their frozen product is a kernel of its own, forward or backward, up to some number of rows of each dtype."""
    inputs = plain((M,), dtypes, K=131, N=67, dropout_p=0.2)
    assert_parity(native, inputs, dy=dy_for(inputs))


@built
@pytest.mark.parametrize("strength", [1e-3, 1.0])
@pytest.mark.parametrize("dtypes", TYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_adapter_comes_through_whole(dropout_p, dtypes, strength):
    options = {"K": 193, "N": 271, "r": 7, "dropout_p": dropout_p, "strength": strength}
    inputs = plain((4, 100), dtypes, **options)
    assert_fidelity(native(**inputs), **inputs)
    alone = {**inputs, "weight": torch.zeros_like(inputs["weight"]), "bias": None}
    assert_fidelity(native(**alone), **alone)
    if not dropout_p:  # dx is a layer of dy, with weightᵀ below and an adapter of C and lora_A
        x, dy = inputs["x"].requires_grad_(), dy_for(inputs)
        (dx,) = torch.autograd.grad(native(**inputs), x, dy)
        C = inputs["scaling"] * inputs["lora_B"].double().mT
        assert_fidelity(dx, dy, inputs["weight"].mT, C, inputs["lora_A"].mT)


@built
@pytest.mark.parametrize("dtypes", TYPES)
def test_adapter_of_few_rows_comes_through_whole(dtypes):
    """The few rows of the frozen product are added to what is rounded already: many columns show what that costs."""
    for M in (1, 2, 4, 8):
        inputs = plain((M,), dtypes, K=193, N=20000, r=7, bias=False, strength=0.03)
        assert_fidelity(native(**inputs), **inputs)
        inputs = plain((M,), dtypes, K=20000, N=193, r=7, bias=False, strength=0.03)
        x, dy = inputs["x"].requires_grad_(), dy_for(inputs)
        (dx,) = torch.autograd.grad(native(**inputs), x, dy)
        C = inputs["scaling"] * inputs["lora_B"].double().mT
        assert_fidelity(dx, dy, inputs["weight"].mT, C, inputs["lora_A"].mT)


NAMES = ("x", "weight", "lora_A", "lora_B", "bias", "scaling")
SUBSETS = list(chain.from_iterable(combinations(NAMES, n) for n in range(len(NAMES) + 1)))


@built
@pytest.mark.parametrize("dtypes", TYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("M", [3, 12])
def test_every_subset_gets_the_bits_of_the_full_set(M, dropout_p, dtypes):
    inputs = plain((M,), dtypes, K=37, N=21, scaling=None, dropout_p=dropout_p)
    dy = dy_for(inputs)
    full = evaluate(native, inputs, dy, NAMES)
    assert_parity(full, inputs, dy=dy)
    assert all(full[name].abs().max() > 0 and full[name].is_contiguous() for name in NAMES)
    assert all((full[name].dtype, full[name].shape) == (inputs[name].dtype, inputs[name].shape) for name in NAMES)
    for subset in SUBSETS[1:]:
        some = evaluate(native, inputs, dy, subset)
        assert all(torch.equal(some[name], full[name]) for name in ("y", *subset)), subset
    assert torch.equal(native(**inputs), full["y"]), "without gradients"


@built
def test_backward_computes_no_more_than_is_wanted():
    inputs = plain(scaling=None)
    for subset in SUBSETS[1:]:
        for name in NAMES:
            inputs[name].requires_grad_(name in subset).grad = None
        with saved_tensors() as saved:
            y = native(**inputs)
        assert saved.holds(inputs["x"]) == bool({"weight", "lora_A"} & set(subset)), subset
        y.backward(dy_for(inputs))
        assert all((inputs[name].grad is not None) == (name in subset) for name in NAMES), subset


@built
@pytest.mark.parametrize("dtypes", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "dy"])
@pytest.mark.parametrize("M", [2, 11])
def test_layouts(M, name, layout, dtypes):
    """A transposed weight is that of a Conv1D, an expanded dy that of a sum."""
    inputs = plain((M,), dtypes, K=37, N=21, dropout_p=0.2)
    if name != "dy":
        inputs[name] = laid_out(inputs[name], layout)
    dy = dy_for(inputs, layout if name == "dy" else "contiguous")
    with unchanged(dy, *tensors_of(inputs)):
        assert_parity(native, inputs, dy=dy)


@built
@settings(max_examples=100)
@given(data=st.data(), dtypes=st.sampled_from(TYPES), M=st.integers(0, 40), r=st.sampled_from([1, 3, 8, 17, 40]))
def test_any_plain_layer(data, dtypes, M, r):
    K, N = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    # where a bias is added to few rounded numbers it may cancel them and leave the first rounding
    bias = (dtypes == "fp32" or M * N >= 32) and data.draw(st.booleans())
    p = data.draw(st.sampled_from([0.0, 0.25, 1.0]))
    seed = data.draw(st.integers(0, 2**20))
    inputs = plain((M,), dtypes, K=K, N=N, r=r, bias=bias, dropout_p=p, seed=seed)
    layouts = [x for x in LAYOUTS if x != "expanded"]
    for name in ("x", "weight"):
        inputs[name] = laid_out(inputs[name], data.draw(st.sampled_from(layouts)))
    dy = dy_for(inputs, data.draw(st.sampled_from(layouts)), seed)
    with unchanged(dy, *tensors_of(inputs)), poisoned_empty():
        assert_parity(native, inputs, dy=dy)


@built
@pytest.mark.parametrize("dtypes", TYPES)
@pytest.mark.parametrize("M", [1, 4, 9])
def test_outputs_are_guarded_and_every_call_gives_the_same_bits(all_threads, M, dtypes):
    inputs = plain((M, 3), dtypes, K=300, N=500, dropout_p=0.3, scaling=None)
    dy = dy_for(inputs)
    first = evaluate(native, inputs, dy, NAMES)
    with guarded_outputs():
        assert_parity(native, inputs, dy=dy)
    second = evaluate(native, inputs, dy, NAMES)
    assert all(torch.equal(first[k], second[k]) for k in first)
    for name in NAMES:
        inputs[name].requires_grad_()
    y = native(**inputs)
    y.backward(dy, retain_graph=True)
    y.backward(dy)
    assert all(torch.equal(inputs[name].grad, 2 * first[name]) for name in NAMES)


@built
@pytest.mark.parametrize("backend", ["native", "auto"])
@pytest.mark.parametrize("dtypes", TYPES)
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
    assert ck.explain(routed_lora_linear, **inputs).backend == "aten", "auto takes another"
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
    inputs = plain()  # 21 tokens, rank 5
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
    inputs = plain(dropout_p=0.3)
    dy = dy_for(inputs)
    with dispatched() as ran:
        assert_parity(call, inputs, dy=dy)
    assert (ran == RAN) == (mask_path == "compiled")
    if mask_path == "plain":
        assert "routed_lora.aten.linear" in ran
        with pytest.raises(ValueError, match=r"cannot run routed_lora: it is not built for torch.float32 on cpu"):
            native(**inputs)


@built
@pytest.mark.parametrize("dtypes, M, forward, backward", [
    ("fp32", 1, 1, 0), ("fp32", 2, 1, 1), ("fp32", 3, 0, 1), ("fp32", 7, 0, 1), ("fp32", 8, 0, 0),
    ("bf16+fp32", 1, 0, 1), ("bf16+fp32", 4, 0, 1), ("bf16+fp32", 5, 0, 0),
    ("fp16+fp32", 1, 0, 1), ("fp16+fp32", 8, 0, 1), ("fp16+fp32", 9, 0, 0),
])  # fmt: skip
def test_few_rows_take_their_own_kernel(dtypes, M, forward, backward):
    inputs = plain((M,), dtypes)
    for weight, counts in ((inputs["weight"], True), (laid_out(inputs["weight"], "transposed"), False)):
        with torch.profiler.profile() as profile:
            evaluate(native, {**inputs, "weight": weight}, dy_for(inputs), ["x"])
        called = {event.key: event.count for event in profile.key_averages()}
        assert called["clora_kernels::routed_lora_lay_down"] == 1
        assert called.get("clora_kernels::routed_lora_shrink", 0) == (forward and counts)
        assert called.get("clora_kernels::routed_lora_few_rows", 0) == (backward and counts)
