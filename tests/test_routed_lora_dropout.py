"""Dropout masks recovered from what the layer returns: one a draw, the same forward and backward, fresh each call."""

from __future__ import annotations

import math

import pytest
import torch
from strategies import dy_for

from clora_kernels import dropout_mask, routed_lora_delta, routed_lora_linear
from clora_kernels.autograd.routed_lora.arguments import dropout_tensors
from clora_kernels.reference.routed_lora_samples import make_inputs
from clora_kernels.testing import evaluate

M, K = 37, 75


def identity_layer(device, dtype=torch.float32, **options):
    """y = drop(1): the mask itself, times what a kept element counts."""
    eye = torch.eye(K, device=device)
    return {"x": torch.ones(M, K, device=device, dtype=dtype), "lora_A": eye, "lora_B": eye, **options}


def mask_of(device, **options):
    return routed_lora_delta(**identity_layer(device, **options)) > 0


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_one_mask_forward_and_backward(device, mask_path, p, dtype, backend):
    """In y, in dx (dy = 1) and, row by row, in dA: the mask of the definition, and the value of what is kept."""
    seed = torch.tensor(-(2**62) + 12345, device=device)
    inputs = identity_layer(device, dtype, dropout_p=p, dropout_seed=seed)
    expected = dropout_mask(inputs["x"], p, seed)
    value = torch.tensor(65536 / (65536 - round(65536 * p)), device=device, dtype=torch.float64).to(dtype)

    def run(**arguments):
        return routed_lora_delta(**arguments, backend=backend)

    results = evaluate(run, inputs, torch.ones(M, K, device=device, dtype=dtype), ["x"])
    for t in results.values():
        assert torch.equal(t, torch.where(expected, value, 0))
    for row in (0, 19, M - 1):
        dy = torch.zeros(M, K, device=device, dtype=dtype)
        dy[row] = 1
        dA = evaluate(run, inputs, dy, ["lora_A"])["lora_A"]
        assert torch.equal(dA > 0, expected[row].expand(K, K))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.77])
def test_a_graph_drops_with_the_same_probability(p):
    seed = torch.tensor(3)
    compiled = torch.compile(lambda x: dropout_tensors(p, seed, True, x)[1], fullgraph=True, backend="aot_eager")
    assert int(compiled(torch.ones(2))) == int(dropout_tensors(p, seed, True, torch.ones(2))[1]) == round(65536 * p)


def test_mask_does_not_depend_on_strides_or_leading_dims(device):
    seed = torch.tensor(99, device=device)
    flat = mask_of(device, dropout_p=0.5, dropout_seed=seed)
    wide = torch.ones(K, M, device=device).T
    for x in (wide, wide[None], wide.reshape(M, 1, K)):
        layer = {**identity_layer(device, dropout_p=0.5, dropout_seed=seed), "x": x}
        assert torch.equal((routed_lora_delta(**layer) > 0).view(M, K), flat)


def test_blocks_of_rows_join_without_a_seam(device, mask_path, monkeypatch):
    """Rows are masked a block at a time; where the block ends makes no difference."""
    options = {"dropout_p": 0.5, "dropout_seed": torch.tensor(4, device=device)}
    inputs = make_inputs((200,), 67, 41, 5, device=device)
    names, dy = ["x", "lora_A", "lora_B"], dy_for(inputs)
    whole = evaluate(routed_lora_linear, {**inputs, **options}, dy, names)
    eye = torch.eye(67, device=device)
    ones = {"x": torch.ones(200, 67, device=device), "lora_A": eye, "lora_B": eye}
    mask = routed_lora_delta(**ones, **options)
    monkeypatch.setattr("clora_kernels.kernels.routed_lora.aten.SCRATCH_BYTES", {"cpu": 1, "cuda": 1})
    assert torch.equal(routed_lora_delta(**ones, **options), mask)
    blocked = evaluate(routed_lora_linear, {**inputs, **options}, dy, names)
    assert all(torch.equal((blocked[k] == 0), (whole[k] == 0)) for k in blocked)


def test_fresh_by_call_layer_and_row(device):
    masks = [mask_of(device, dropout_p=0.5) for _ in range(3)]
    assert len({tuple(m.flatten().tolist()) for m in masks}) == 3
    rows = {tuple(row.tolist()) for m in masks for row in m}
    assert len(rows) == 3 * M
    columns = {tuple(column.tolist()) for m in masks for column in m.T}
    assert len(columns) == 3 * K


def test_manual_seed_makes_a_run_repeatable(device):
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runs.append([mask_of(device, dropout_p=0.3) for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])


def test_a_seed_tensor_replays_a_draw_and_leaves_the_generator_alone(device):
    before = torch.get_rng_state()
    seeds = [torch.tensor(s, device=device) for s in (5, 5, 6, -5, 5 + 2**32)]
    first, again, *others = [mask_of(device, dropout_p=0.5, dropout_seed=seed) for seed in seeds]
    assert torch.equal(first, again) and not any(torch.equal(first, other) for other in others)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("off", [{"training": False}, {"dropout_p": 0.0}])
def test_switched_off_it_draws_nothing(device, off):
    inputs = make_inputs(device=device)
    before = torch.get_rng_state()
    y = routed_lora_linear(**{**inputs, "dropout_p": 0.5, **off})
    assert torch.equal(y, routed_lora_linear(**inputs)) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [1.0, 1 - 2**-18])
def test_everything_dropped_leaves_the_base(device, mask_path, p):
    """No 0·∞: the adapter's part is exactly zero, in y and in every gradient."""
    inputs = make_inputs(dropout_p=p, gate=(5,), device=device)
    names = ["x", "lora_A", "lora_B", "routing", "gate"]
    results = evaluate(routed_lora_linear, inputs, dy_for(inputs), names)
    bare = {**inputs, "lora_B": 0 * inputs["lora_B"]}
    without = evaluate(routed_lora_linear, bare, dy_for(inputs), ["x"])
    assert torch.equal(results["y"], without["y"]) and torch.equal(results["x"], without["x"])
    assert not any(results[name].any() for name in names[1:])


def test_probability_below_the_step_drops_nothing(device):
    assert mask_of(device, dropout_p=2**-18).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_statistics(device, p):
    """Kept fraction, and agreement of neighbours in a row, in a column and between calls, within six standard errors:
    each goes wrong once in 10⁹ draws."""
    eye = torch.eye(64, device=device)
    ones = torch.ones(2000, 64, device=device)
    masks = [routed_lora_delta(ones, eye, eye, dropout_p=p) > 0 for _ in range(2)]
    q = 1 - p
    assert all(abs(m.float().mean().item() - q) <= 6 * math.sqrt(p * q / m.numel()) for m in masks)
    m = masks[0]
    for a, b in ((m[:, 1:], m[:, :-1]), (m[1:], m[:-1]), (m[:, 8:], m[:, :-8]), tuple(masks)):
        both = (a & b).float().mean().item()
        assert abs(both - q * q) <= 6 * math.sqrt(q * q * (1 - q * q) / a.numel()) * math.sqrt(3)


def test_mean_over_draws_is_the_layer_without_dropout(device):
    """E[drop(x)] = x: the mean over n draws lies within six standard errors in every element."""
    inputs = make_inputs((3,), 64, 5, 4, device=device)
    exact = routed_lora_linear(**inputs).double()
    draws = torch.stack([routed_lora_linear(**inputs, dropout_p=0.25) for _ in range(600)]).double()
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= 6 * standard_error).all()


@pytest.mark.gpu
def test_replays_of_a_graph_draw_fresh_masks():
    """The seed is drawn on the device inside the graph, so each replay has another mask."""
    layer = identity_layer(torch.device("cuda"), dropout_p=0.5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        routed_lora_delta(**layer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = routed_lora_delta(**layer)
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append(y > 0)
    assert not torch.equal(*masks)


@pytest.mark.gpu
def test_nothing_synchronises(no_syncs):
    inputs = make_inputs((64,), 64, 64, 8, dropout_p=0.3, gate=(8,), frozen=True, scaling=None, device="cuda")
    inputs["dropout_seed"] = None
    inputs["x"].requires_grad_()
    inputs["lora_A"].requires_grad_()
    routed_lora_linear(**inputs).sum().backward()
    with no_syncs():
        routed_lora_linear(**inputs).sum().backward()
