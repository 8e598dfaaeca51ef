"""C-LoRA against its equations: start, gradients, loss, boundary, drift, inference, options."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from sequences import TARGETS, Net, batch, learn, train

from clora_kernels.continual import CLoRA


def clora(**options) -> CLoRA:
    return CLoRA(Net(), TARGETS, r=4, **options)


def test_starts_without_changing_the_model_but_able_to_learn() -> None:
    model, x = Net(), torch.randn(5, 6)
    before = model(x)
    method = CLoRA(model, TARGETS, r=4)
    torch.testing.assert_close(model(x), before)
    for layer in method.layers.values():
        assert not layer.routing.any() and not layer.frozen_routing.any() and layer.lora_A.any()
    B = torch.cat([layer.lora_B.flatten() for layer in CLoRA(Net(), TARGETS, r=64).layers.values()])
    assert B.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.1)
    method.begin_task()
    F.cross_entropy(model(x), torch.zeros(5, dtype=torch.long)).backward()
    for layer in method.layers.values():
        assert layer.routing.grad.any() and not layer.lora_A.grad.any() and not layer.lora_B.grad.any()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_are_those_of_the_paper(backend: str) -> None:
    """dA = (Γ·Bᵀ)·R_δᵀ, dB = R_δᵀ·(Aᵀ·Γ), dR_δ = Aᵀ·Γ·Bᵀ with Γ = dL/dΔW, in fp64."""
    method = CLoRA(Net().double(), TARGETS, r=4, scaling=0.5, backend=backend)
    method.begin_task()
    layer = method.layers["first"]
    torch.nn.init.normal_(layer.routing)
    torch.nn.init.normal_(layer.frozen_routing)
    x, dy = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 9, dtype=torch.float64)
    layer(x).backward(dy)
    A, B, R = layer.lora_A.detach().mT, layer.lora_B.detach().mT, layer.routing.detach()
    gamma = 0.5 * x.mT @ dy
    torch.testing.assert_close(layer.lora_A.grad.mT, gamma @ B.mT @ R.mT)
    torch.testing.assert_close(layer.lora_B.grad.mT, R.mT @ (A.mT @ gamma))
    torch.testing.assert_close(layer.routing.grad, A.mT @ gamma @ B.mT)


@pytest.mark.parametrize(("basis", "rank"), [("leading", 2), ("full", 3), ("raw", None)])
def test_loss_is_what_of_the_new_routing_lies_in_the_basis(basis: str, rank: int | None) -> None:
    method = clora(orthogonality=0.5, basis=basis)
    method.begin_task()
    assert method.extra_losses() == {}
    method.end_task()
    # Shares of the squared norm: 0.64, 0.27, 0.09, 0.
    old = torch.diag(torch.tensor([0.64, 0.27, 0.09, 0.0]).sqrt())
    for layer in method.layers.values():
        layer.frozen_routing.copy_(old)
    method.begin_task()
    for layer in method.layers.values():
        torch.nn.init.normal_(layer.routing)
    (loss,) = method.extra_losses().values()
    inside = [(old.mT @ m.routing if rank is None else m.routing[:rank]).square().sum() for m in method.layers.values()]
    torch.testing.assert_close(loss, 0.5 * sum(inside))
    loss.backward()
    outside = method.layers["first"].routing.grad[(3 if rank is None else rank) :]
    assert method.layers["first"].routing.grad.any() and not outside.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_full_basis_spans_what_the_old_routing_does(dtype: torch.dtype) -> None:
    """Columns that repeat or add earlier ones count nothing, a short one counts whole, a layer without a routing has no
    basis: loss and gradient are those of the singular vectors, whose span is the same."""
    method = CLoRA(Net().to(dtype), TARGETS, r=4, basis="full")
    method.begin_task()
    method.end_task()
    first = method.layers["first"].frozen_routing
    first.copy_(torch.randn(4, 4, dtype=dtype))
    first[:, 1] = -2 * first[:, 0]
    first[:, 2] *= 1e-3
    first[:, 3] = first[:, 0] + 500 * first[:, 2]
    method.begin_task()
    for layer in method.layers.values():
        torch.nn.init.normal_(layer.routing)
    basis = method.kept["basis"]
    assert basis.shape == (2, 4, 4) and basis.dtype == dtype and not basis[1].any()
    assert basis[0].any(0).tolist() == [True, True, False, False]
    left = torch.linalg.qr(first[:, [0, 2]].double()).Q
    span = (left @ left.mT).to(dtype)
    torch.testing.assert_close(basis[0] @ basis[0].mT, span)
    R = method.layers["first"].routing
    (loss,) = method.extra_losses().values()
    torch.testing.assert_close(loss, (left.mT.to(dtype) @ R).square().sum())
    loss.backward()
    torch.testing.assert_close(R.grad, 2 * span @ R.detach())
    assert not method.layers["second"].routing.grad.any()


def test_a_full_basis_is_all_there_is_where_the_old_routing_has_full_rank() -> None:
    """Then the loss is ‖R_δ‖², whatever the scale of the old routing."""
    for scale in (1e-20, 1.0, 1e15):
        method = clora(basis="full")
        method.begin_task()
        method.end_task()
        for layer in method.layers.values():
            layer.frozen_routing.copy_(scale * torch.randn(4, 4))
        method.begin_task()
        for layer in method.layers.values():
            torch.nn.init.normal_(layer.routing)
        (loss,) = method.extra_losses().values()
        torch.testing.assert_close(loss, sum(R.square().sum() for R in method.routings()))


def test_what_the_task_found_goes_to_the_device_where_it_is_used() -> None:
    """The device of tensors without values is one that others cannot be mixed with."""
    method = clora()
    learn(method, 1)
    method.begin_task()
    method.model.to("meta")
    (loss,) = method.extra_losses().values()
    (layer,) = (layer for name, layer in method.routed() if name == "first")
    change, whole = method._moved("first", layer)
    assert loss.is_meta and all(t.is_meta for t in (*change, *whole))


@pytest.mark.parametrize("basis", ["leading", "full", "raw"])
def test_after_a_task_that_learned_nothing_there_is_nothing_to_keep_away_from(basis: str) -> None:
    method = clora(basis=basis)
    method.begin_task()
    method.end_task()
    method.begin_task()
    (losses,) = train(method, torch.optim.SGD(method.param_groups(0.1)), 2, range(1))
    assert losses["orthogonality"] == 0
    assert method.end_task().measures == {"drift": None, "overlap": None}


def test_no_weight_no_loss() -> None:
    method = clora(orthogonality=0.0)
    learn(method, 1)
    method.begin_task()
    assert method.extra_losses() == {}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_boundary_moves_the_routing_and_not_the_outputs(backend: str) -> None:
    method = clora(backend=backend)
    x, _ = batch(1, 99)
    for _ in range(3):
        method.begin_task()
        train(method, torch.optim.SGD(method.param_groups(0.1), momentum=0.9), method.task, range(5))
        before = method.model(x)
        old = [layer.frozen_routing.clone() for layer in method.layers.values()]
        new = [layer.routing.detach().clone() for layer in method.layers.values()]
        method.end_task()
        for layer, o, n in zip(method.layers.values(), old, new, strict=True):
            assert n.any() and torch.equal(layer.frozen_routing, o + n) and not layer.routing.any()
        if backend == "auto":
            assert torch.equal(method.model(x), before)
        else:
            # The reference multiplies both routings with B before it adds them.
            torch.testing.assert_close(method.model(x), before)


def test_drift_and_overlap_are_those_of_the_formulas() -> None:
    method = clora(energy=0.6)
    (first,) = learn(method, 1)
    assert first.measures == {"drift": None, "overlap": None}
    start = {n: {k: v.clone().double() for k, v in m.adapter_state_dict().items()} for n, m in method.layers.items()}
    method.begin_task()
    train(method, torch.optim.SGD(method.param_groups(0.1)), 2, range(10))
    end = {n: {k: v.clone().double() for k, v in m.adapter_state_dict().items()} for n, m in method.layers.items()}
    report = method.end_task()
    moved = whole = inside = routing = 0.0
    for name, s in start.items():
        R_old, e = s["frozen_routing"], end[name]
        path = s["lora_A"].mT @ R_old @ s["lora_B"].mT
        moved += (e["lora_A"].mT @ R_old @ e["lora_B"].mT - path).square().sum().item()
        whole += path.square().sum().item()
        left, sigma, _ = torch.linalg.svd(R_old)
        rank = 1 + int((sigma.square().cumsum(0) < 0.6 * sigma.square().sum()).sum())
        inside += (left[:, :rank].mT @ e["routing"]).square().sum().item()
        routing += e["routing"].square().sum().item()
    assert report.measures["drift"] == pytest.approx(math.sqrt(moved / whole), rel=1e-6) and moved > 0
    assert report.measures["overlap"] == pytest.approx(inside / routing, rel=1e-4)
    assert f"drift {report.measures['drift']:.3g}" in str(report)


def test_factors_of_the_first_task_stay() -> None:
    method = clora(train_factors="first_task")
    learn(method, 1)
    factors = [p.clone() for p in method.factors()]
    assert [len(g["params"]) for g in method.param_groups(0.1)] == [4, 2]
    method.begin_task()
    groups = method.param_groups(0.1, 0.2)
    assert [(g["lr"], len(g["params"])) for g in groups] == [(0.2, 2)]
    train(method, torch.optim.SGD(groups), 2, range(5))
    assert all(torch.equal(a, b) for a, b in zip(factors, method.factors(), strict=True))
    assert all(p.grad is None for p in method.factors()) and all(p.grad.any() for p in method.routings())
    report = method.end_task()
    # fp64 sums of equal and opposite terms.
    assert report.trainable == 2 * 16 and report.measures["drift"] <= 1e-12


def test_the_loss_keeps_the_new_routing_out_of_the_old_ones_basis() -> None:
    overlaps = []
    for orthogonality in (0.0, 5.0):
        torch.manual_seed(3)
        overlaps.append(learn(clora(orthogonality=orthogonality), 2)[1].measures["overlap"])
    assert overlaps[1] < 0.5 * overlaps[0]


def test_param_groups_by_rate() -> None:
    method = clora()
    method.begin_task()
    factors, routings = method.param_groups(0.1, 0.3)
    assert (factors["lr"], routings["lr"]) == (0.1, 0.3)
    assert {id(p) for p in factors["params"]} == {id(p) for p in method.factors()}
    assert {id(p) for p in routings["params"]} == {id(p) for p in method.routings()}
    assert [g["lr"] for g in method.param_groups(0.1)] == [0.1, 0.1]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Rprop])
def test_adaptive_optimizers_are_warned_of_once_a_task(optimizer) -> None:
    method = clora()
    for task in (1, 2):
        method.begin_task()
        with pytest.warns(UserWarning, match=f"lora_A and lora_B are trained by {optimizer.__name__}") as caught:
            train(method, optimizer(method.param_groups(1e-3)), task, range(3))
        assert len(caught) == 1
        method.end_task()


def test_no_warning_where_the_factors_are_safe() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(clora(), 2)
        method = clora(train_factors="first_task")
        learn(method, 1)
        method.begin_task()
        train(method, torch.optim.Adam([*method.factors(), *method.routings()]), 2, range(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "half"}, "basis: got 'half', expected one of leading, full, raw"),
        ({"train_factors": "never"}, "train_factors: got 'never'"),
        ({"orthogonality": -1.0}, "orthogonality: got -1.0"),
        ({"orthogonality": math.nan}, "orthogonality: got nan, expected a finite weight"),
        ({"orthogonality": math.inf}, "orthogonality: got inf, expected a finite weight"),
        ({"r": 0}, "r: got 0"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=message):
        CLoRA(model, TARGETS, **options)
    assert type(model.first) is torch.nn.Linear


def test_energy_is_checked_where_it_is_given() -> None:
    for energy in (1.5, -0.5, math.nan):
        with pytest.raises(ValueError, match=f"energy: got {energy}, expected a fraction"):
            clora(energy=energy)
    for option, value in (
        ("energy", None),
        ("energy", "1"),
        ("orthogonality", "1"),
        ("orthogonality", 1j),
        ("energy", True),
    ):
        with pytest.raises(TypeError, match=f"{option}: got {type(value).__name__}, expected a number"):
            clora(**{option: value})
