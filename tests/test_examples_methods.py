"""The methods that the examples add, each in one file: their equations on plain weights, inference, going on bit for
bit."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sequences import TARGETS, Net, batch
from torch import Tensor, nn

from clora_kernels.continual import ContinualMethod, RoutedLoRAMethod, load_run, save_run

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LR, STEPS = 0.3, 8


@pytest.fixture(scope="module")
def classes():
    """The methods by name, with what they must be told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        from o_lora import OLoRA
        from sd_lora import SDLoRA

        yield {"o-lora": (OLoRA, {}), "sd-lora": (SDLoRA, {"tasks": 4})}


@pytest.fixture(params=["o-lora", "sd-lora"])
def make(request, classes):
    cls, needed = classes[request.param]
    return lambda model, **options: cls(model, TARGETS, **{"r": 2, **needed, **options})


def begin(method: ContinualMethod) -> torch.optim.Optimizer:
    method.begin_task()
    return torch.optim.SGD(method.param_groups(LR), momentum=0.9)


def train(method: ContinualMethod, optimizer: torch.optim.Optimizer, numbers: range = range(STEPS)) -> None:
    dtype = method.model.out.weight.dtype
    for number in numbers:
        x, labels = batch(method.task, number)
        x = x.to(dtype)
        method.training_step(x, lambda x=x, y=labels: F.cross_entropy(method.model(x), y), optimizer)


def learn(method: ContinualMethod, tasks: int) -> list:
    reports = []
    for _ in range(tasks):
        train(method, begin(method))
        reports.append(method.end_task())
    return reports


def pairs(method: RoutedLoRAMethod) -> dict[str, tuple[Tensor, Tensor]]:
    return {n: (m.lora_A.detach().clone(), m.lora_B.detach().clone()) for n, m in method.layers.items()}


def steps_on_plain_weights(base: Net, task: int, learning: list[Tensor], weights: Any, extra: Any) -> None:
    """SGD on leaves in place, ``weights()`` the weight of each layer, ``extra()`` a loss beside the task's."""
    for p in learning:
        p.requires_grad_()
    optimizer = torch.optim.SGD(learning, LR, momentum=0.9)
    for number in range(STEPS):
        x, labels = batch(task, number)
        optimizer.zero_grad()
        y = torch.func.functional_call(base, {f"{n}.weight": w for n, w in weights().items()}, x.double())
        (F.cross_entropy(y, labels) + extra()).backward()
        optimizer.step()
    for p in learning:
        p.requires_grad_(False)


def test_o_lora_is_what_its_equations_say(classes) -> None:
    base = Net().double()
    method = classes["o-lora"][0](copy.deepcopy(base), TARGETS, r=2, scaling=2.0)
    weights = {n: base.get_submodule(n).weight.detach().clone() for n in TARGETS}
    old: list[dict[str, Tensor]] = []
    for task in (1, 2, 3):
        optimizer = begin(method)
        leaves = pairs(method)

        def overlap(leaves=leaves) -> Any:
            return sum((leaves[n][0] @ A[n].mT).abs().sum() for A in old for n in TARGETS)

        def now(leaves=leaves, weights=weights) -> dict[str, Tensor]:
            return {n: weights[n] + 2.0 * B @ A for n, (A, B) in leaves.items()}

        train(method, optimizer)
        learning = [t for pair in leaves.values() for t in pair]
        steps_on_plain_weights(base, task, learning, now, lambda overlap=overlap: 0.5 * overlap())
        torch.testing.assert_close(pairs(method), leaves)
        report = method.end_task()
        assert (report.measures["overlap"] is None) == (task == 1)
        if task > 1:
            torch.testing.assert_close(report.measures["overlap"], overlap().item())
        weights = now()
        for name in TARGETS:
            torch.testing.assert_close(method.layers[name].weight.detach(), weights[name])
            assert not method.layers[name].lora_B.any()
        old.append({n: A for n, (A, _) in leaves.items()})


def test_sd_lora_is_what_its_equations_say(classes) -> None:
    base = Net().double()
    method = classes["sd-lora"][0](copy.deepcopy(base), TARGETS, tasks=4, r=2, scaling=2.0)
    directions: dict[str, list[Tensor]] = {n: [] for n in TARGETS}
    alphas: dict[str, Tensor] = {n: torch.zeros(0, dtype=torch.float64) for n in TARGETS}
    for task in (1, 2, 3):
        optimizer = begin(method)
        leaves = pairs(method)

        def now(leaves=leaves) -> dict[str, Tensor]:
            return {
                n: base.get_submodule(n).weight
                + 2.0 * (B @ A + sum(a * d for a, d in zip(alphas[n], directions[n], strict=True)))
                for n, (A, B) in leaves.items()
            }

        started = {n: a.clone() for n, a in alphas.items()}
        train(method, optimizer)
        learning = [t for pair in leaves.values() for t in pair] + (list(alphas.values()) if task > 1 else [])
        steps_on_plain_weights(base, task, learning, now, lambda: 0.0)
        assert task == 1 or not any(torch.equal(started[n], alphas[n]) for n in TARGETS)
        torch.testing.assert_close(pairs(method), leaves)
        report = method.end_task()
        norms = {n: torch.linalg.matrix_norm(B @ A) for n, (A, B) in leaves.items()}
        for n, (A, B) in leaves.items():
            directions[n].append(B @ A / norms[n])
            alphas[n] = torch.cat([alphas[n], norms[n][None]])
            torch.testing.assert_close(method.layers[n].magnitudes.detach(), F.pad(alphas[n], (0, 4 - task)))
        whole = sum(a.abs().sum() for a in alphas.values())
        torch.testing.assert_close(report.measures["share"], float(sum(norms.values()) / whole))


def test_the_outputs_do_not_change_at_the_boundary(make) -> None:
    method, x = make(Net().double()), batch(9, 9)[0].double()
    optimizer = begin(method)
    for _ in range(3):
        train(method, optimizer)
        live = method.model(x)
        method.end_task()
        torch.testing.assert_close(method.model(x), live)
        optimizer = begin(method)
        torch.testing.assert_close(method.model(x), live)


def test_a_new_pair_starts_as_lora_does(make) -> None:
    method = make(Net())
    train(method, begin(method))
    before = pairs(method)
    method.end_task()
    for name, (A, B) in pairs(method).items():
        assert A.any() and not B.any() and not torch.equal(A, before[name][0])


def test_a_task_that_learns_nothing_changes_nothing(make) -> None:
    base, x = Net(), batch(9, 9)[0]
    method = make(copy.deepcopy(base))
    method.begin_task()
    method.end_task()
    method.begin_task()
    torch.testing.assert_close(method.model(x), base(x))
    assert all(t.isfinite().all() for t in method.state_dict().values())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_inference_is_the_live_model(make, backend: str) -> None:
    base = Net().double()
    method, x = make(base, backend=backend, dropout_p=0.25), batch(9, 9)[0].double()
    learn(method, 2)
    train(method, begin(method))
    live = method.model.eval()(x)
    plain = method.inference_model()
    assert {type(m) for m in plain.modules()} == {Net, nn.Linear}
    torch.testing.assert_close(plain(x), live)
    assert torch.equal(method.outputs(x)[0], plain(x)) and torch.equal(method.model(x), live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_bit_for_bit_from_the_middle_of_the_third_task(make, dtype: torch.dtype, tmp_path) -> None:
    base = Net().to(dtype)
    method, x = make(copy.deepcopy(base), dropout_p=0.25), batch(9, 9)[0].to(dtype)
    learn(method, 2)
    optimizer = begin(method)
    train(method, optimizer, range(4))
    resumed = make(copy.deepcopy(base), dropout_p=0.25)
    path = save_run(tmp_path / "run.safetensors", method, optimizer=optimizer)
    ends = []
    for m in (method, resumed):
        if m is resumed:
            run = load_run(path, resumed)
            assert (resumed.task, resumed.in_task) == (3, True)
            optimizer = torch.optim.SGD(resumed.param_groups(LR), momentum=0.9)
            run.restore(optimizer=optimizer)
        train(m, optimizer, range(4, STEPS))
        measures = m.end_task().measures
        learn(m, 1)
        ends.append((measures, m.state_dict(), m.outputs(x)[0]))
    (measures, expected, y), (again, got, y_again) = ends
    assert measures == again and torch.equal(y, y_again) and got.keys() == expected.keys()
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_a_run_goes_on_between_tasks(make) -> None:
    base, (x, _) = Net(), batch(9, 9)
    method, resumed = make(copy.deepcopy(base)), make(copy.deepcopy(base))
    learn(method, 2)
    resumed.load_state_dict({k: v.clone() for k, v in method.state_dict().items()})
    assert torch.equal(resumed.model(x), method.model(x))
    ends = []
    for m in (method, resumed):
        torch.manual_seed(5)
        learn(m, 1)
        ends.append(m.model(x))
    assert torch.equal(*ends)


@pytest.mark.parametrize("when", ["within a task", "loaded within a task", "between tasks"])
@pytest.mark.parametrize("there", [{"device": "meta"}, {"dtype": torch.float64}], ids=["device", "dtype"])
def test_the_model_may_move(make, when: str, there: dict) -> None:
    """To another dtype, or to the device of tensors without values: what stays behind cannot be mixed in."""
    base = Net()
    method = make(copy.deepcopy(base), backend="reference")
    learn(method, 2)
    if "within" in when:
        begin(method)
    if "loaded" in when:
        state, method = method.state_dict(), make(base, backend="reference")
        method.load_state_dict(state)
    method.model.to(**there)
    if "between" in when:
        method.kept = {key: t.to(**there) if ".2." in key else t for key, t in method.kept.items()}
        method.on_load()
        begin(method)
    x = batch(9, 9)[0].to(**there)
    for found in (method.model(x), *method.extra_losses().values()):
        assert (found.device, found.dtype) == (x.device, x.dtype)


def test_bad_options_are_named(classes) -> None:
    (o_lora, _), (sd_lora, _) = classes["o-lora"], classes["sd-lora"]
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"orthogonality: got {weight}, expected a finite weight"):
            o_lora(Net(), TARGETS, orthogonality=weight)
    for tasks in (0, 2.0):
        with pytest.raises(ValueError, match=f"tasks: got {tasks}, expected the most tasks"):
            sd_lora(Net(), TARGETS, tasks=tasks)
    method = sd_lora(Net(), TARGETS, tasks=1)
    learn(method, 1)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    with pytest.raises(ValueError, match="tasks: got task 2, expected at most the 1 that were announced"):
        method.begin_task()
    assert all(torch.equal(before[k], v) for k, v in method.state_dict().items())
    with pytest.raises(ValueError, match=r"state_dict\['magnitudes'\]: got shape \(1,\), expected \(3,\)"):
        sd_lora(Net(), TARGETS, tasks=3).load_state_dict(before)


def test_the_loss_is_weighted_and_makes_the_overlap_fall(classes) -> None:
    overlaps = []
    for weight in (0.0, 0.5):
        torch.manual_seed(3)
        method = classes["o-lora"][0](Net(), TARGETS, r=2, orthogonality=weight)
        learn(method, 1)
        method.begin_task()
        losses = method.extra_losses()
        assert set(losses) == ({"orthogonality"} if weight else set())
        assert all(torch.equal(loss, weight * method.overlap()) for loss in losses.values())
        train(method, torch.optim.SGD(method.param_groups(0.02)), range(40))
        overlaps.append(method.end_task().measures["overlap"])
    assert overlaps[1] < 0.5 * overlaps[0]


def test_what_learns_and_what_stays(classes) -> None:
    """SD-LoRA: earlier pairs stay bit for bit, magnitudes of tasks to come stay zero."""
    method = classes["sd-lora"][0](Net(), TARGETS, tasks=4, r=2)
    assert [r.trainable for r in learn(method, 2)] == [2 * (6 + 9) + 2 * (9 + 5), 2 * (6 + 9) + 2 * (9 + 5) + 2 * 4]
    kept = {k: v.clone() for k, v in method.kept.items()}
    learn(method, 1)
    assert kept and all(torch.equal(method.kept[k], v) for k, v in kept.items())
    for layer in method.layers.values():
        assert (layer.magnitudes[:3] != 0).all() and layer.magnitudes[3] == 0
        layer.reset_adapter()
    assert all(torch.equal(layer.weight, linear.weight) for layer, linear in zip(
        method.layers.values(), (method.inference_model().first, method.inference_model().second), strict=True
    ))  # fmt: skip
