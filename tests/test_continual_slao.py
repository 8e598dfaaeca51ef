"""SLAO against its equations: start, merge, inference, what is kept, going on bit for bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from sequences import TARGETS, Net, batch, learn, train
from torch import Tensor, nn

from clora_kernels.continual import SLAO

Pairs = dict[str, tuple[Tensor, Tensor]]


def slao(base: nn.Module | None = None, **options) -> SLAO:
    return SLAO(copy.deepcopy(base) if base is not None else Net(), TARGETS, **{"r": 4, **options})


def tensors(method: SLAO) -> Pairs:
    return {n: (m.lora_A.detach().clone(), m.lora_B.detach().clone()) for n, m in method.layers.items()}


def merged(method: SLAO) -> Pairs:
    return {n: (pair["lora_A"].clone(), pair["lora_B"].clone()) for n, pair in method.tested_adapters(None).items()}


def equal(one: Pairs, other: Pairs) -> bool:
    return all(torch.equal(a, b) for n in one for a, b in zip(one[n], other[n], strict=True))


def by_the_paper(base: Net, start: Pairs, tasks: int, scaling: float) -> tuple[list[Pairs], list[Pairs]]:
    """(fine-tuned, merged) after each task, on plain PyTorch: explicit weights, torch's QR, a sign for each row."""
    fine, merged_pairs = [], []
    current = start
    for i in range(1, tasks + 1):
        if i > 1:
            started = {}
            for name, (A, B) in current.items():
                Q, R = torch.linalg.qr(A.mT)
                started[name] = ((Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).mT, B)
            current = started
        leaves = {n: tuple(t.clone().requires_grad_() for t in pair) for n, pair in current.items()}
        optimizer = torch.optim.SGD([t for pair in leaves.values() for t in pair], 0.1, momentum=0.9)
        for number in range(10):
            x, labels = batch(i, number)
            weights = {f"{n}.weight": base.get_submodule(n).weight + scaling * B @ A for n, (A, B) in leaves.items()}
            optimizer.zero_grad()
            F.cross_entropy(torch.func.functional_call(base, weights, x.double()), labels).backward()
            optimizer.step()
        current = {n: tuple(t.detach() for t in pair) for n, pair in leaves.items()}
        fine.append(current)
        if i == 1:
            merged_pairs.append(current)
        else:
            before, lam = merged_pairs[-1], i**-0.5
            merged_pairs.append({n: (A, (1 - lam) * before[n][1] + lam * B) for n, (A, B) in current.items()})
    return fine, merged_pairs


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_four_tasks_are_those_of_the_paper(backend: str) -> None:
    base = Net().double()
    method = slao(base, backend=backend, scaling=2.0)
    expected = by_the_paper(base, tensors(method), 4, 2.0)
    for i in range(4):
        method.begin_task()
        optimizer = torch.optim.SGD(method.param_groups(0.1), momentum=0.9)
        for number in range(10):
            step_in_double(method, optimizer, number)
        report = method.end_task()
        assert report.measures["lambda"] == 1 / math.sqrt(i + 1)
        for got, wanted in zip((tensors(method), merged(method)), (pairs[i] for pairs in expected), strict=True):
            torch.testing.assert_close(got, wanted)
        # Inference is W + s·B_m·A_m.
        plain = method.inference_model()
        for name, (A, B) in expected[1][i].items():
            torch.testing.assert_close(plain.get_submodule(name).weight, base.get_submodule(name).weight + 2.0 * B @ A)
    assert all(not torch.equal(tensors(method)[n][1], merged(method)[n][1]) for n in TARGETS)


def test_a_task_starts_from_orthonormal_rows_of_the_same_span() -> None:
    method = slao(Net().double())
    first = tensors(method)
    method.begin_task()
    assert equal(tensors(method), first)
    train_in_double(method)
    method.end_task()
    before = tensors(method)
    method.begin_task()
    for name, (A, B) in tensors(method).items():
        A_ft, B_ft = before[name]
        torch.testing.assert_close(A @ A.mT, torch.eye(4, dtype=A.dtype))
        torch.testing.assert_close(A_ft @ A.mT @ A, A_ft)
        # diag(R) > 0: each row leans the way of the one that it was made of.
        R = A @ A_ft.mT
        torch.testing.assert_close(R, R.triu())
        assert (R.diagonal() > 0).all() and torch.equal(B, B_ft)


def train_in_double(method: SLAO) -> None:
    optimizer = torch.optim.SGD(method.param_groups(0.1))
    for number in range(5):
        step_in_double(method, optimizer, number)


def step_in_double(method: SLAO, optimizer: torch.optim.Optimizer, number: int) -> None:
    x, labels = batch(method.task, number)
    method.training_step(x, lambda: F.cross_entropy(method.model(x.double()), labels), optimizer)


def test_the_start_takes_the_fine_tuned_pair_and_not_the_merged() -> None:
    method = slao()
    learn(method, 3)
    fine, kept = tensors(method), merged(method)
    assert not any(torch.equal(fine[n][1], kept[n][1]) for n in TARGETS)
    method.begin_task()
    assert all(torch.equal(tensors(method)[n][1], fine[n][1]) for n in TARGETS)


def test_dependent_rows_are_drawn_anew() -> None:
    """Rows that repeat earlier ones, or are zero, become some orthonormal rows; the others stay what QR makes them."""
    method = slao(Net().double())
    method.begin_task()
    method.end_task()
    layer = method.layers["first"]
    with torch.no_grad():
        layer.lora_A[1] = -3 * layer.lora_A[0]
        layer.lora_A[2] = 0
    A_ft = layer.lora_A.detach().clone()
    method.begin_task()
    A = layer.lora_A.detach()
    torch.testing.assert_close(A @ A.mT, torch.eye(4, dtype=A.dtype))
    torch.testing.assert_close(A_ft @ A.mT @ A, A_ft)
    Q, R = torch.linalg.qr(A_ft[[0, 3]].mT)
    torch.testing.assert_close(A[[0, 3]], (Q * R.diagonal().sign()).mT)


def test_all_layers_start_in_one_call(monkeypatch) -> None:
    from clora_kernels.continual import slao as module

    calls, real = [], module.gram_schmidt_foreach
    monkeypatch.setattr(module, "gram_schmidt_foreach", lambda *a, **k: calls.append(len(a[0])) or real(*a, **k))
    learn(slao(), 3)
    assert calls == [2, 2]


def test_the_live_function_jumps_where_inference_does_not() -> None:
    method = slao()
    x, _ = batch(9, 9)
    method.begin_task()
    train(method, torch.optim.SGD(method.param_groups(1.0)), 1, range(5))
    for task in (2, 3):
        (tested,) = method.outputs(x)
        method.end_task()
        assert torch.equal(method.outputs(x)[0], tested)
        assert torch.equal(method.inference_model()(x), tested)
        live = method.model(x)
        method.begin_task()
        with pytest.raises(AssertionError):
            torch.testing.assert_close(method.model(x), live)
        train(method, torch.optim.SGD(method.param_groups(1.0)), task, range(5))
        with pytest.raises(AssertionError):
            torch.testing.assert_close(method.outputs(x)[0], method.model(x))


def test_within_a_task_inference_is_as_if_it_ended_now() -> None:
    method = slao()
    learn(method, 2)
    method.begin_task()
    train(method, torch.optim.SGD(method.param_groups(0.1)), 3, range(5))
    kept, now = {k: v.clone() for k, v in method.kept.items()}, merged(method)
    for name, (A, B) in tensors(method).items():
        A_m, B_m = now[name]
        assert torch.equal(A_m, A) and not torch.equal(kept[f"merged.{name}.lora_A"], A)
        before = kept[f"merged.{name}.lora_B"]
        assert torch.equal(B_m, before + 1 / math.sqrt(3) * (B - before))
    # Looking changes nothing.
    assert all(torch.equal(method.kept[k], v) for k, v in kept.items())
    method.end_task()
    assert equal(merged(method), now)


def test_what_is_kept_is_no_view_of_what_learns() -> None:
    method = slao()
    learn(method, 1)
    before, (x, _) = merged(method), batch(9, 9)
    (tested,) = method.outputs(x)
    with torch.no_grad():
        for p in method.parameters():
            p += 1
    assert equal(merged(method), before) and torch.equal(method.outputs(x)[0], tested)


def test_before_the_first_task_the_model_is_what_it_was() -> None:
    base, (x, _) = Net(), batch(9, 9)
    method = slao(base)
    torch.testing.assert_close(method.outputs(x)[0], base(x))
    method.begin_task()
    method.end_task()
    torch.testing.assert_close(method.outputs(x)[0], base(x))


def test_distance_is_that_of_the_formula() -> None:
    method = slao(Net().double())
    method.begin_task()
    assert method.end_task().measures == {"lambda": 1.0, "distance": None, "drift": None, "overlap": None}
    method.begin_task()
    train_in_double(method)
    assert method.end_task().measures["drift"] is None  # of zero
    for task in (3, 4):
        before = merged(method)
        method.begin_task()
        train_in_double(method)
        with torch.no_grad():
            for layer in method.layers.values():  # further than training moves them out of the old rows
                layer.lora_A += 0.1 * torch.randn_like(layer.lora_A)
        report = method.end_task()
        fine, kept = tensors(method), merged(method)
        apart = sum((fine[n][1] @ fine[n][0] - kept[n][1] @ kept[n][0]).square().sum() for n in TARGETS)
        whole = sum((fine[n][1] @ fine[n][0]).square().sum() for n in TARGETS)
        torch.testing.assert_close(report.measures["distance"], (apart / whole).sqrt().item())
        moved = sum((kept[n][1] @ kept[n][0] - B @ A).square().sum() for n, (A, B) in before.items())
        served = sum((B @ A).square().sum() for A, B in before.values())
        torch.testing.assert_close(report.measures["drift"], (moved / served).sqrt().item())
        spans = {n: torch.linalg.qr(A.mT).Q for n, (A, _) in before.items()}
        inside = sum((fine[n][0] @ Q).square().sum() for n, Q in spans.items())
        rows = sum(A.square().sum() for A, _ in fine.values())
        torch.testing.assert_close(report.measures["overlap"], (inside / rows).item())
        assert 0 < report.measures["drift"] and 0.1 < report.measures["overlap"] < 0.99
        assert report.measures["distance"] > 0 and report.measures["lambda"] == 1 / math.sqrt(task)
    method = slao()
    first = {"lambda": 1.0, "distance": 0.0, "drift": None, "overlap": None}
    assert learn(method, 1)[0].measures == first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pairs_of_16_bit_weights_are_merged_in_fp32(dtype: torch.dtype) -> None:
    method = SLAO(Net().to(dtype), TARGETS, r=4)
    for step in (0.5, 2**-12):
        method.begin_task()
        with torch.no_grad():
            for layer in method.layers.values():
                layer.lora_B += step
        method.end_task()
    lam = 1 / math.sqrt(2)
    for name in TARGETS:
        A, B = merged(method)[name]
        assert A.dtype == B.dtype == torch.float32
        # 16 bit could not tell this from 1/2.
        assert torch.equal(B, torch.full_like(B, 0.5) + lam * torch.full_like(B, 2**-12))


def test_a_run_goes_on_bit_for_bit_in_the_middle_of_a_task() -> None:
    base, (x, _) = Net(), batch(9, 9)
    method = slao(base)
    learn(method, 2)
    method.begin_task()
    train(method, torch.optim.SGD(method.param_groups(0.1)), 3, range(4))
    state = {k: v.clone() for k, v in method.state_dict().items()}
    resumed = slao(base)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.outputs(x)[0], method.outputs(x)[0])
    ends = []
    for m in (method, resumed):
        train(m, torch.optim.SGD(m.param_groups(0.1)), 3, range(4, 8))
        measures = m.end_task().measures
        learn(m, 1)
        ends.append((measures, m.state_dict(), m.outputs(x)[0]))
    (measures, expected, y), (measures_2, got, y_2) = ends
    assert measures == measures_2 and torch.equal(y, y_2)
    assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in expected)


def test_memory_is_two_pairs_whatever_the_number_of_tasks() -> None:
    assert [r.stored for r in learn(slao(), 4)] == [2 * 4 * ((6 + 9) + (9 + 5))] * 4


def test_dropout_trains_and_is_not_tested() -> None:
    method = slao(dropout_p=0.5)
    learn(method, 2)
    x, _ = batch(9, 9)
    assert not torch.equal(method.model.train()(x), method.model(x))
    assert torch.equal(method.outputs(x)[0], method.outputs(x)[0])


def test_a_rank_that_no_orthonormal_rows_can_have_is_refused() -> None:
    model = Net()
    with pytest.raises(ValueError, match="r: got 7 for a layer of 6 in_features, expected at most these"):
        SLAO(model, ["second", "first"], r=7)
    assert type(model.first) is type(model.second) is nn.Linear
    with pytest.raises(ValueError, match="r: got 0"):
        SLAO(model, TARGETS, r=0)
    learn(SLAO(model, TARGETS, r=6), 2)
