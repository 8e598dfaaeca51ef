"""Rank-1 experts against fp64: y and every gradient, on every path, in every dtype, option, size and layout."""

from __future__ import annotations

import warnings
from contextlib import ExitStack

import pytest
import torch
from experts import DIFFERENTIABLE, FLOATS, PATHS, SAMPLES, calls, check, dy_for, paths, run, sample
from hypothesis import HealthCheck, given, settings
from strategies import DTYPES, LAYOUTS, laid_out, tensors_of

from clora_kernels import extension, rank1_experts
from clora_kernels.kernels.rank1_experts import aten, dense
from clora_kernels.reference.rank1_experts_samples import make_inputs
from clora_kernels.testing import (
    dispatched,
    evaluate,
    guarded,
    guarded_outputs,
    poisoned_empty,
    saved_tensors,
    unchanged,
)

pytestmark = pytest.mark.filterwarnings("ignore:clora_kernels has no compiled rank1_experts")


@pytest.mark.parametrize(("dtypes", "path"), PATHS)
@pytest.mark.parametrize("name", SAMPLES)
def test_samples(device, monkeypatch, name, dtypes, path):
    """Every option; inputs and saved tensors unchanged, no unwritten memory read, the chosen path at work."""
    inputs = sample(name, dtypes, device)
    dy = dy_for(inputs)
    with unchanged(dy, *tensors_of(inputs)), poisoned_empty(), saved_tensors(), dispatched() as ran:
        result = check(run(path, monkeypatch), inputs, dy)
    assert set(result) >= {"y", "x", "experts_A", "experts_B"}
    primitives = ["shrink", "expand", "order", "shrink", "expand", "reduce", "reduce"]
    assert ran == [f"rank1_experts.{path}.{primitive}" for primitive in primitives]


@pytest.mark.parametrize(("dtypes", "path"), [p for p in PATHS if p[0] in ("fp32", "bf16+fp32", "fp64")])
@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_is_written_beyond_an_output(device, monkeypatch, name, path, dtypes):
    inputs = sample(name, dtypes, device)
    with guarded_outputs():
        check(run(path, monkeypatch), inputs)


@pytest.mark.parametrize("dtypes", ["fp32", "fp64", "fp32+bf16"])
@pytest.mark.parametrize("name", SAMPLES)
def test_reference_by_autograd_agrees_with_its_backward_by_hand(device, name, dtypes):
    with dispatched() as ran:
        check(lambda **inputs: rank1_experts(**inputs, backend="reference"), sample(name, dtypes, device))
    assert ran == []


SIZES = [
    ((1,), 2049, 517, 1100, 32),
    ((7,), 517, 2049, 64, 5),
    ((1000,), 67, 131, 12, 1),
    ((3, 333), 131, 67, 300, 4),
    ((257,), 35, 67, 65, 65),
    ((2, 5), 1025, 1031, 2100, 7),
]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("dtypes", "path"), [p for p in PATHS if p[0] in ("fp32", "bf16", "bf16+fp32", "fp16")])
@pytest.mark.parametrize("lead, K, N, E, k", SIZES)
def test_sizes(device, monkeypatch, all_threads, lead, K, N, E, k, dtypes, path, per_sample):
    dtype, experts_dtype = DTYPES[dtypes]
    options = {"dtype": dtype, "experts_dtype": experts_dtype, "scaling": None, "per_sample": per_sample}
    check(run(path, monkeypatch), make_inputs(lead, K, N, E, k, **options, device=device))


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("per_sample", [False, True])
def test_rows_that_all_choose_one_expert(device, monkeypatch, all_threads, path, per_sample):
    """Long sums, by all rows and twice by each, beside experts that nobody chose."""
    inputs = make_inputs((5, 700), 37, 41, 9, 4, per_sample=per_sample, device=device)
    inputs["indices"] = torch.full_like(inputs["indices"], 3)
    inputs["indices"][..., 1] = 8
    fn = run(path, monkeypatch)
    check(fn, inputs)
    grads = evaluate(fn, inputs, dy_for(inputs), ["experts_A", "experts_B"])
    for name in ("experts_A", "experts_B"):
        used = grads[name].abs().amax(1) > 0
        assert used.nonzero().flatten().tolist() == [3, 8]


@pytest.mark.parametrize("path", ["aten", "dense"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
def test_little_scratch(device, monkeypatch, path, per_sample, dtypes):
    """Blocks of few rows, and of a part of a sample."""
    monkeypatch.setattr(aten, "SCRATCH_BYTES", dict.fromkeys(("cpu", "cuda"), 5000))
    monkeypatch.setattr(dense, "SCRATCH_BYTES", dict.fromkeys(("cpu", "cuda"), 1))
    inputs = made_inputs(dtypes, device, lead=(3, 150), E=11, k=3, per_sample=per_sample)
    check(run(path, monkeypatch), inputs)


@pytest.mark.parametrize("path", paths())
def test_gates_of_zero_and_unused_experts(device, monkeypatch, path):
    inputs = make_inputs((4, 3), E=30, k=3, device=device)
    inputs["gates"] = torch.zeros_like(inputs["gates"])
    fn = run(path, monkeypatch)
    check(fn, inputs)
    grads = evaluate(fn, inputs, dy_for(inputs), ["x", "experts_A", "experts_B", "gates"])
    assert not grads["y"].any() and not grads["x"].any() and not grads["experts_A"].any()
    assert not grads["experts_B"].any() and grads["gates"].abs().min() > 0


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*FLOATS, "indices", "dy", "all"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
def test_each_tensor_in_each_layout(device, monkeypatch, path, name, layout, dtypes):
    inputs = made_inputs(dtypes, device)
    for key in (*FLOATS, "indices") if name == "all" else [name]:
        if key == "indices" and layout in ("stepped", "padded"):  # their gaps are NaN
            inputs[key] = torch.stack([inputs[key], inputs[key] + 2**30], -1)[..., 0]
        elif key != "dy":
            inputs[key] = laid_out(inputs[key], layout)
    dy = dy_for(inputs, layout if name in ("dy", "all") else "contiguous")
    with unchanged(dy, *tensors_of(inputs)):
        check(run(path, monkeypatch), inputs, dy)


def made_inputs(dtypes, device, **options):
    dtype, experts_dtype = DTYPES[dtypes]
    options = {"scaling": None, "base_output": dtype, **options}
    return make_inputs(dtype=dtype, experts_dtype=experts_dtype, device=device, **options)


@pytest.mark.parametrize(("dtypes", "path"), PATHS)
@pytest.mark.parametrize("offset", [1, 3])
def test_base_pointers_aligned_to_one_element(device, monkeypatch, dtypes, path, offset):
    """Every tensor starts in the middle of a vector, between margins that stay as they are."""
    inputs = made_inputs(dtypes, device, K=64, N=96)
    with ExitStack() as stack:
        moved = {k: stack.enter_context(guarded(v, offset)) if k in FLOATS else v for k, v in inputs.items()}
        dy = stack.enter_context(guarded(dy_for(inputs), offset))
        check(run(path, monkeypatch), moved, dy)


@pytest.mark.parametrize(("dtypes", "path"), PATHS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_bitwise_repeatable(device, monkeypatch, all_threads, dtypes, path, per_sample):
    """Two calls, and two backwards of one call, give the same bits, duplicates included; accumulating doubles them."""
    inputs = made_inputs(dtypes, device, lead=(3, 70), K=130, N=70, E=9, k=6, per_sample=per_sample)
    dy, fn = dy_for(inputs), run(path, monkeypatch)
    first, second = (evaluate(fn, inputs, dy, DIFFERENTIABLE) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    for name in DIFFERENTIABLE:
        inputs[name].requires_grad_()
    y = fn(**inputs)
    y.backward(dy, retain_graph=True)
    once = {name: inputs[name].grad.clone() for name in DIFFERENTIABLE}
    y.backward(dy)
    for name in DIFFERENTIABLE:
        assert torch.equal(inputs[name].grad, 2 * once[name]) and torch.equal(once[name], first[name]), name
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


@pytest.mark.skipif("native" not in paths(), reason="nothing is compiled for this device")
def test_compiled_rows_do_not_depend_on_the_rows_beside_them(device, monkeypatch):
    inputs, fn = make_inputs((90,), 131, 67, device=device), run("native", monkeypatch)
    y = fn(**inputs)
    for rows in (slice(0, 1), slice(40, 53)):
        part = {k: v[rows] if k in ("x", "indices", "gates") else v for k, v in inputs.items()}
        assert torch.equal(fn(**part), y[rows])


@given(calls())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_call(drawn):
    """Random shapes, options, dtypes and strides, M = 0 included, on the path that such a call takes."""
    inputs, dy = drawn
    with unchanged(dy, *tensors_of(inputs)):
        check(rank1_experts, inputs, dy)


def test_every_path_gives_the_same(device, monkeypatch):
    inputs = made_inputs("fp32", device)
    results = [run(path, monkeypatch)(**inputs) for path in paths()]
    for y in results:
        torch.testing.assert_close(y, results[0])


def test_fallback_warns_once_and_says_how_to_build(device, monkeypatch):
    inputs = make_inputs(E=400, device=device)
    monkeypatch.setattr(extension, "_kernels", frozenset())
    monkeypatch.setattr(extension, "_warned", set())
    with warnings.catch_warnings(record=True) as caught, dispatched() as ran:
        warnings.simplefilter("always", RuntimeWarning)
        ys = [rank1_experts(**inputs) for _ in range(3)]
    assert len(caught) == 1 and caught[0].category is RuntimeWarning and caught[0].filename == __file__
    assert "pip install --no-build-isolation ." in str(caught[0].message)
    assert all(torch.equal(y, ys[0]) for y in ys) and set(ran) == {
        "rank1_experts.aten.shrink",
        "rank1_experts.aten.expand",
    }
