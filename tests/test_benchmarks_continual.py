"""The benchmark of the continual-learning methods: what it times is a whole training step of a second task, and nobody
whose losses or gradients are wrong is timed."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
ALL = ("c-lora", "cl-lora", "dac", "slao", "lora")


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of the benchmarks; the models "tiny" and "tiny-llama" are among those of the methods."""
    monkeypatch.syspath_prepend(str(FOLDER))
    models = importlib.import_module("continual.models")
    monkeypatch.setitem(models.MODELS, "tiny", models.Shape(2, 32, 4, 4, 64))
    monkeypatch.setitem(models.MODELS, "tiny-llama", models.Shape(2, 32, 4, 2, 64, llama=True))
    return importlib.import_module


def point_of(benchmarks, method, model="tiny", dtype=torch.float32, batch=2):
    return benchmarks("continual.points").Point("small", method, model, batch, 9, dtype)


def problem_of(benchmarks, *arguments, **options):
    return benchmarks("continual").make_problem(point_of(benchmarks, *arguments, **options), CPU)


@pytest.mark.parametrize("method", ALL)
def test_what_is_timed_is_the_training_step_of_a_second_task(benchmarks, method):
    contestants = benchmarks("continual.contestants")
    problem = problem_of(benchmarks, method)
    assert problem.method.task == 2 and problem.method.in_task
    assert all(bool(p.any()) for p in problem.method.trainable())
    timed, driven = contestants.Training(problem), contestants.Training(problem)
    torch.manual_seed(1)
    timed.backward(timed.forward())
    torch.manual_seed(1)
    losses = driven.method.training_step(
        driven.x,
        lambda: contestants.loss_of(driven.method.model, driven.head, driven.x, driven.labels),
        driven.optimizer,
    )
    extra = {"c-lora": {"orthogonality"}, "cl-lora": {"distillation", "block_weights"}, "dac": {"ago"}}
    assert losses.keys() == {"task"} | extra.get(method, set())
    # the gradients of every step of the batch are in the momentum
    momenta = [[state["momentum_buffer"] for state in t.optimizer.state.values()] for t in (timed, driven)]
    assert len(momenta[0]) == len([*problem.method.trainable(), *problem.head.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))


@pytest.mark.parametrize("method", ALL)
def test_every_call_does_the_same(benchmarks, method):
    """And contestants leave each other, and the problem, as they were."""
    contestants = benchmarks("continual.contestants")
    problem = problem_of(benchmarks, method)
    before = copy.deepcopy(problem.method.state_dict())
    training = contestants.ours(problem)
    losses = []
    for _ in range(20):
        torch.manual_seed(1)
        loss = training.forward()
        training.backward(loss)
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(20))
    after = problem.method.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "method, model",
    [*((method, "tiny") for method in ALL), *((method, "tiny-llama") for method in ALL if method != "cl-lora")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_methods_are_held_to_fp64(benchmarks, dtype, method, model):
    checks, operation = benchmarks("continual.checks"), benchmarks("continual").OPERATION
    problem = problem_of(benchmarks, method, model, dtype)
    truth = operation.truths(problem)
    parts = {name: t for name, t in truth.items() if not name.startswith("error_")}
    assert {t.dtype for t in parts.values()} == {torch.float64}
    steps = {"task", "distillation"} if method == "cl-lora" else {"task"}
    assert {name.partition("/")[0] for name in parts} == steps
    trained = [name for name in parts if name.startswith("task/") and "loss" not in name and "head" not in name]
    assert sum(parts[name].numel() for name in trained) == sum(p.numel() for p in problem.method.trainable())
    verdict = checks.check("ours", problem, truth)
    assert verdict.trained == sum(p.numel() for p in problem.method.trainable()) and verdict.error < 0.5
    reference = checks.check("ours_reference", problem, truth)
    assert reference.error == pytest.approx(max(float(truth[f"error_{name}"]) for name in parts))


@pytest.mark.parametrize("wrong", ["lora_B", "scaling", "distillation", "missing", "too many"])
def test_nobody_is_timed_with_a_wrong_step(benchmarks, wrong, monkeypatch):
    """A gradient that is a thousandth off, of a large or a small parameter or in the method's own step; a step that is
    left out; a parameter that learns and should not."""
    checks = benchmarks("continual.checks")
    problem = problem_of(benchmarks, "cl-lora")
    truth = benchmarks("continual").truths(problem)
    checks.check("ours", problem, truth)
    right = checks.BUILDERS["ours"]

    def broken(given):
        training = right(given)
        method, adjust = training.method, training.method.adjust_gradients
        shared, specific = next(iter(method.shared.values())), next(iter(method.specific.values()))

        def adjusted(step):
            adjust(step)
            at = {"lora_B": specific.lora_B, "scaling": specific.scaling, "distillation": shared.lora_B}.get(wrong)
            if at is not None and step == ("distillation" if wrong == "distillation" else "task"):
                at.grad *= 1.001
            if wrong == "too many":
                shared.lora_A.requires_grad_().grad = torch.ones_like(shared.lora_A)

        method.adjust_gradients = adjusted
        if wrong == "missing":
            method.distillation = 0
        if wrong == "too many":
            shared.lora_A.requires_grad_()
        return training

    monkeypatch.setitem(checks.BUILDERS, "ours", broken)
    with pytest.raises(AssertionError, match="differ from" if wrong in ("missing", "too many") else "is off by"):
        checks.check("ours", problem, truth)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_points_cover_methods_and_models(benchmarks, device):
    operation, models = benchmarks("continual").OPERATION, benchmarks("continual.models").MODELS
    points = operation.points(torch.device(device))
    assert {(p.method, models[p.model].llama) for p in points} == {
        (method, llama) for method in ALL for llama in (False, True) if (method, llama) != ("cl-lora", True)
    }
    assert {(models[p.model].width, p.tokens) for p in points if p.model.startswith("vit")} == {(768, 197)}
    assert any(p.quick for p in points) and len({p.batch for p in points}) > 1


def test_the_floor_counts_the_flops_of_the_frozen_model(benchmarks):
    operation = benchmarks("continual").OPERATION
    problem = problem_of(benchmarks, "cl-lora")
    frozen = operation.builders["frozen"](problem)
    counted = {}
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            loss = frozen.forward()
        counted["forward"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            frozen.backward(loss)
        counted["backward"] = counter.get_total_flops()
    head = 2 * 2 * 32 * benchmarks("continual.models").CLASSES
    floor = operation.floor("frozen", problem.point).as_json()
    assert {part: floor[part]["flops"] for part in counted} == {
        "forward": counted["forward"] - head,
        "backward": counted["backward"] - 2 * head,
    }


def test_the_floor_of_a_method_knows_its_steps(benchmarks):
    """Of two blocks CL-LoRA's first one is shared: in its own step it runs twice forward and once backward."""
    floor = benchmarks("continual").OPERATION.floor
    found = {name: floor("ours", point_of(benchmarks, name)) for name in ("cl-lora", "dac")}
    frozen = floor("frozen", point_of(benchmarks, "dac"))
    linears, adapted, both = 6, 2, 2
    per_block = linears + 2 * adapted + 1  # pack and shrink beside each adapted layer's product, and attention
    # of the first block: no dx of q, k, v, no dA; each adapted layer has shrink, reduce and unpack
    shared = linears - 3 + 3 * adapted + 1
    assert [step.name for step in found["cl-lora"].forward].count("pack") == adapted * (both + 2)
    assert len(found["cl-lora"].forward) == per_block * (both + 2) + shared
    assert len(found["cl-lora"].backward) == shared + linears + 4 * adapted + 1
    assert len(frozen.forward) == len(frozen.backward) == both * (linears + 1)
    assert len(found["dac"].backward) == both * (5 * linears + 1) - 3
    flops = [sum(step.flops for step in f.forward) for f in (found["dac"], frozen)]
    assert flops[0] > flops[1]


def test_a_point_is_measured_and_told(benchmarks, monkeypatch):
    run, results = benchmarks("run"), benchmarks("results")
    operation = benchmarks("continual").OPERATION
    rates = {torch.float32: 1e11}
    ceilings = benchmarks("roofline").Ceilings(2e10, rates)
    point = point_of(benchmarks, "cl-lora")
    rows = run.measure_point(operation, point, list(operation.builders), CPU, ceilings, 0.01, "wall")
    assert [row["contestant"] for row in rows] == ["frozen", "ours", "ours_reference"]
    frozen, ours, _ = rows
    assert ours["ratio_to"].keys() == {"frozen", "ours_reference"}
    assert frozen["peak_above_frozen_bytes"] is None and isinstance(ours["peak_above_frozen_bytes"], int)
    assert 0 < ours["error"] < 1e-3 and ours["error_of"].startswith(("task/", "distillation/"))
    table = results.table(rows, operation).splitlines()
    assert len(table) == 3 and table[1].endswith("k") and not table[0].endswith("k")
    told = results.against(rows, operation, "ours_reference")
    assert "ours / ours_reference, 1 points" in told and "slower, both" in told


def test_the_plain_dropout_of_large_batches_is_left_out_on_a_cpu(benchmarks):
    why_not = benchmarks("continual").OPERATION.why_not
    large = point_of(benchmarks, "dac", batch=64)
    assert "dropout" in why_not("ours_reference", large, CPU)
    assert why_not("ours", large, CPU) is None and why_not("ours_reference", large, torch.device("cuda")) is None
    assert why_not("ours_reference", point_of(benchmarks, "dac"), CPU) is None
    assert why_not("ours_reference", point_of(benchmarks, "c-lora", batch=64), CPU) is None
