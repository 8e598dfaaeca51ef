"""The benchmark of PEFT models: what it times are whole steps that do the same every time, and nobody whose logits or
gradients are wrong is timed."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

CPU = torch.device("cpu")
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
EAGER = ["peft", "ours"]

# PEFT asks transformers what transformers renames.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing:FutureWarning")


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of the benchmarks; the models "llama", "vit" and "block" are among those of the steps."""
    monkeypatch.syspath_prepend(str(FOLDER))
    models = importlib.import_module("peft_steps.models")
    monkeypatch.setitem(models.MODELS, "llama", models.Shape(2, 32, 4, 2, 48, llama=True))
    monkeypatch.setitem(models.MODELS, "block", models.Shape(1, 32, 4, 2, 48, llama=True))
    monkeypatch.setitem(models.MODELS, "vit", models.Shape(2, 32, 4, 4, 48))
    return importlib.import_module


@pytest.fixture
def quickly(monkeypatch):
    """torch.compile of models without a code generator; those it got."""
    compiled, right = [], torch.compile

    def compile_quickly(what, **options):
        if not isinstance(what, torch.nn.Module):  # of a library that is imported meanwhile
            return right(what, **options)
        compiled.append(what)
        return right(what, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_quickly)
    return compiled


def point_of(benchmarks, model="llama", dtype=torch.float32, **options):
    tokens = 10 if model == "vit" else 9
    return benchmarks("peft_steps.points").Point("small", model, 2, tokens, dtype, **options)


def problem_of(benchmarks, *arguments, **options):
    return benchmarks("peft_steps").make_problem(point_of(benchmarks, *arguments, **options), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "model, options",
    [
        ("llama", {}),
        ("llama", {"dropout_p": 0.3}),
        ("vit", {}),
        ("vit", {"dropout_p": 0.3}),
        ("llama", {"generates": True}),
    ],
)
def test_steps_are_held_to_fp64(benchmarks, dtype, model, options):
    operation = benchmarks("peft_steps").OPERATION
    problem = problem_of(benchmarks, model, dtype, **options)
    truth = operation.truths(problem)
    parts = {name: t for name, t in truth.items() if not name.startswith("error/")}
    assert {t.dtype for t in parts.values()} == {torch.float64}
    layers = 2 * len(benchmarks("peft_steps.models").MODELS[model].linears())
    assert len(parts) == (2 if problem.point.generates else 1 + 2 * layers)
    assert all(bool(t.any()) for t in parts.values())
    theirs, ours = (operation.check(name, problem, truth) for name in EAGER)
    assert theirs.error == pytest.approx(max(float(truth[f"error/{name}"]) for name in parts))
    assert 0 < ours.error < (1e-5 if dtype == torch.float32 else 0.1) and ours.error_of in parts
    # Generating in fp32 on a CPU several calls to MKL stand in place of one operator of our own.
    assert 0 < ours.launches < theirs.launches or (problem.point.generates and dtype == torch.float32)


@pytest.mark.parametrize("model, options", [("llama", {}), ("vit", {}), ("llama", {"generates": True})])
@pytest.mark.parametrize("name", EAGER)
def test_every_call_does_the_same(benchmarks, name, model, options):
    """And contestants leave each other, and the problem, as they were."""
    problem = problem_of(benchmarks, model, **options)
    before = copy.deepcopy(problem.model.state_dict())
    step = benchmarks("peft_steps").OPERATION.builders[name](problem)
    firsts, seconds = [], []
    for _ in range(20):
        first = step.forward()
        firsts.append(first.detach().clone())
        seconds.append(step.backward(first))
    torch.testing.assert_close(torch.stack(firsts), firsts[0].expand(20, *firsts[0].shape))
    if problem.point.generates:
        assert all(torch.equal(second, seconds[0]) for second in seconds) and not torch.equal(firsts[0], seconds[0])
    else:
        state = step.optimizer.state
        assert len(state) == sum(p.requires_grad for p in problem.model.parameters())
        assert {int(of_one["step"]) for of_one in state.values()} == {20}
    after = problem.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_generation_continues_what_is_in_the_cache(benchmarks):
    """The logits of both steps are those of all tokens at once."""
    problem = problem_of(benchmarks, generates=True)
    step = benchmarks("peft_steps").OPERATION.builders["ours"](problem)
    first = step.forward()
    second = step.backward(first)
    with torch.no_grad():
        whole = problem.model(**problem.batch, use_cache=False).logits
    torch.testing.assert_close(torch.cat([first, second], 1), whole[:, -2:])


@pytest.mark.parametrize("wrong", ["gradient", "missing", "too many", "second", "left alone", "fell back"])
def test_nobody_is_timed_with_a_wrong_step(benchmarks, wrong, monkeypatch):
    """A gradient that is a thousandth off; a parameter that learns nothing, or should not; a token at another place;
    layers that are PEFT's own."""
    checks = benchmarks("peft_steps.checks")
    problem = problem_of(benchmarks, generates=wrong == "second")
    truth = benchmarks("peft_steps").truths(problem)
    checks.check("ours", problem, truth)
    right = checks.BUILDERS["ours"]

    def broken(given):
        if wrong == "left alone":
            linear = next(m for m in given.model.modules() if hasattr(m, "lora_B"))
            linear.lora_B["default"].register_forward_hook(lambda *_: None)
        step = right(given)
        learning = [p for p in step.model.parameters() if p.requires_grad]
        if wrong == "gradient":
            learning[3].register_hook(lambda gradient: 1.001 * gradient)
        if wrong == "missing":
            learning[3].requires_grad_(False)
        if wrong == "too many":
            step.model.get_parameter("base_model.model.lm_head.weight").requires_grad_()
        if wrong == "second":
            step.tokens.reverse()
        if wrong == "fell back":
            next(m for m in step.model.modules() if hasattr(m, "fell_back")).fell_back = "of a hook"
        return step

    monkeypatch.setitem(checks.BUILDERS, "ours", broken)
    messages = {"missing": "differ from", "too many": "differ from", "left alone": "left to PEFT", "fell back": "hook"}
    with pytest.raises(AssertionError, match=messages.get(wrong, "is off by")):
        checks.check("ours", problem, truth)


def test_what_was_compiled_and_checked_is_what_is_timed(benchmarks, quickly):
    """A compiled model draws otherwise: it is held to PEFT's own without dropout, and drops again afterwards."""
    operation = benchmarks("peft_steps").OPERATION
    problem = problem_of(benchmarks, "block", dropout_p=0.3, compiled=True)
    truth = operation.truths(problem)
    for name in ("peft_compiled", "ours_compiled"):
        verdict = operation.check(name, problem, truth)
        assert 0 < verdict.error < 1e-5 and verdict.launches is None
        step = operation.builders[name](problem)
        assert step.run is not step.model and quickly[-1] is step.model
        assert len({float(step.forward().detach()) for _ in range(3)}) == 3
    assert len(quickly) == 2
    point = dataclasses.replace(problem.point, compiled=False)
    assert "few points" in operation.why_not("ours_compiled", point, CPU)
    assert operation.why_not("ours", point, CPU) is operation.why_not("ours_compiled", problem.point, CPU) is None


def test_launches_are_the_operators_that_others_do_not_call(benchmarks):
    x, layer = torch.randn(3, 4), torch.nn.Linear(4, 5)

    def forward():
        return F.linear(x, layer.weight, layer.bias).relu()  # on its inside F.linear is a transpose and a product

    step = SimpleNamespace(model=layer, forward=forward, backward=lambda y: y.sum())
    assert benchmarks("peft_steps.checks").launches("ours", step) == 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_points_cover_models_and_steps(benchmarks, device):
    points = benchmarks("peft_steps").OPERATION.points(torch.device(device))
    shapes = benchmarks("peft_steps.models").MODELS
    trains = [p for p in points if not p.generates]
    assert {(shapes[p.model].llama, p.dropout_p > 0) for p in trains} == {(a, b) for a in (0, 1) for b in (0, 1)}
    assert {p.batch for p in points if p.generates} >= {1, 16}
    assert {p.generates for p in points if p.compiled} == {False, True} and not points[0].generates
    assert "vit-b" in {p.model for p in points}
    if device == "cuda":
        block, tokens = shapes["llama-8b"], {p.batch * p.tokens for p in trains if p.model == "llama-8b"}
        assert (block.width, block.heads, block.kv_heads, block.ffn) == (4096, 32, 8, 14336) and 8192 in tokens


def test_the_floor_knows_training_from_generating(benchmarks):
    floor = benchmarks("peft_steps").OPERATION.floor
    point = point_of(benchmarks)
    training, generating = floor("ours", point), floor("ours", dataclasses.replace(point, generates=True))
    linears, blocks = 7, 2
    assert len(training.forward) == blocks * (3 * linears + 1)
    assert len(training.backward) == blocks * (5 * linears + 1) - 3  # no dx of q, k and v in the first block
    assert generating.forward == generating.backward and len(generating.forward) == len(training.forward)
    attention = generating.forward[-1]
    assert attention.flops == 2 * 2 * 2 * 10 * 32  # q·kᵀ and p·v of two samples, each with ten tokens of width 32
    assert attention.bytes == 2 * 4 * (2 * 9 * 16 + 2 * 2 * 16 + 2 * 32)
    assert sum(s.flops for s in training.forward) > sum(s.flops for s in generating.forward)


def test_a_point_is_measured_and_told(benchmarks, quickly):
    run, results = benchmarks("run"), benchmarks("results")
    operation = benchmarks("peft_steps").OPERATION
    ceilings = benchmarks("roofline").Ceilings(2e10, {torch.float32: 1e11})
    point = point_of(benchmarks, "block", generates=True, compiled=True)
    rows = run.measure_point(operation, point, list(operation.builders), CPU, ceilings, 0.01, "wall")
    assert [row["contestant"] for row in rows] == ["peft", "peft_compiled", "ours", "ours_compiled"]
    theirs, _, ours, _ = rows
    assert ours["ratio_to"].keys() == {"peft", "peft_compiled", "ours_compiled"} and ours["peak_bytes"] > 0
    table = results.table(rows, operation).splitlines()
    rate, launches = table[2].split()[-2:]
    assert int(launches) == ours["launches"] and theirs["launches"] > 0
    assert float(rate) == pytest.approx(2 * 2 / ours["seconds"]["both"]["median"], rel=0.01)
    assert results.header(operation).endswith("tokens/s  launches")
    for mine in operation.ours:
        assert f"{mine} / peft, 1 points" in results.against(rows, operation, "peft", mine)


def test_without_peft_the_others_are_measured(benchmarks, monkeypatch, tmp_path):
    registry, module = benchmarks("registry"), benchmarks("operation")
    assert all(not operation.missing for operation in registry.OPERATIONS.values())
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert registry.OPERATIONS["peft"].missing == ["peft", "transformers"]
    assert "peft" not in [selection.operation.name for selection in registry.select(CPU)]
    with pytest.raises(ValueError, match="op: peft needs peft, transformers, not installed here"):
        registry.select(CPU, "peft")
    steps = benchmarks("suite").steps(CPU, tmp_path, resumed=False)
    assert not any("peft" in step.name for step in steps) and any("continual" in step.name for step in steps)
