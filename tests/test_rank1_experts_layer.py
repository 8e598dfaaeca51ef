"""Rank1ExpertLinear: what it chooses and computes, its gradients and counts, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from layers import best, expert_layer, function_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

import clora_kernels as ck
from clora_kernels import ProductKeyScores, Rank1ExpertLinear
from clora_kernels.reference import rank1_experts as reference
from clora_kernels.testing import assert_parity, dispatched

SETTINGS = [(selection, weights) for selection in ("sample", "token", "batch") for weights in ("probability", "unit")]
SHAPES = [(4, 7), (4,), (2, 3, 5), ()]


def expected_choice(layer, x):
    """Indices and gates by lists, one row after another."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])[:, 0] if layer.selection != "token" and x.dim() > 2 else x
    scores = F.linear(rows.to(layer.scoring.weight.dtype), layer.scoring.weight, layer.scoring.bias).detach()
    indices = torch.tensor([best(s.tolist(), layer.k) for s in scores.reshape(-1, layer.experts)])
    if layer.selection == "batch":
        counts = [indices.flatten().tolist().count(e) for e in range(layer.experts)]
        indices = torch.tensor([best(counts, layer.k)] * len(indices))
    indices = indices.reshape(*scores.shape[:-1], layer.k)
    return indices, scores.softmax(-1).gather(-1, indices) if layer.weights == "probability" else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("selection", "weights"), SETTINGS)
def test_layer_is_the_equation_of_what_it_chooses(selection, weights, shape, dtype):
    layer, x = expert_layer(selection, weights, dtype), torch.randn(*shape, 37).to(dtype)
    indices, gates = expected_choice(layer, x)
    chosen = layer.chosen(x)
    assert torch.equal(chosen.indices, indices)
    assert chosen.gates is None if weights == "unit" else torch.equal(chosen.gates, gates)
    inputs = {"x": x, "experts_A": layer.experts_A, "experts_B": layer.experts_B, "indices": indices, "scaling": 0.7}
    inputs |= {"base_output": F.linear(x, layer.weight, layer.bias)} | ({} if gates is None else {"gates": gates})
    assert_parity({"y": layer(x).detach()}, inputs, reference=reference)
    assert layer(x).dtype == dtype and layer.experts_A.dtype == (dtype if dtype.itemsize > 2 else torch.float32)


@pytest.mark.parametrize(("selection", "weights"), SETTINGS)
def test_starts_as_the_linear_layer(selection, weights):
    linear, x = nn.Linear(37, 29), torch.randn(3, 4, 37)
    layer = Rank1ExpertLinear.from_linear(linear, 11, 4, selection=selection, weights=weights)
    assert layer.weight is linear.weight and layer.bias is linear.bias and isinstance(layer, nn.Linear)
    assert torch.equal(layer(x), linear(x)) and layer.experts_B.shape == (11, 29)
    limit = 1 / math.sqrt(37)
    assert layer.experts_A.abs().max() <= limit and (layer.experts_A.abs() > 0.98 * limit).any()
    assert layer.experts_A.unique().numel() > 300 and (layer.selection, layer.weights) == (selection, weights)


@pytest.mark.parametrize("selection", ["sample", "token", "batch"])
def test_no_samples_give_no_output(selection):
    layer = expert_layer(selection)
    y = layer(torch.randn(0, 7, 37, requires_grad=True))
    assert y.shape == (0, 7, 29)
    y.sum().backward()
    assert not layer.experts_B.grad.any() and not layer.activation_counts.any()


def test_of_equal_scores_the_lowest_index_goes_first():
    layer = expert_layer("batch", "unit", k=3)
    with torch.no_grad():
        layer.scoring.weight.zero_()
        layer.scoring.bias.zero_()
    assert layer.chosen(torch.randn(2, 3, 37)).indices.tolist() == [[0, 1, 2]] * 2
    votes = torch.tensor([[5, 2, 9], [9, 1, 4], [7, 9, 5], [4, 20, 21]])
    layer = expert_layer("batch", "unit", k=3, scoring=lambda x: (votes, torch.ones(4, 3)))
    assert layer.chosen(torch.randn(4, 3, 37)).indices.tolist() == [[9, 4, 5]] * 4, "three votes, two, two"


@pytest.mark.parametrize("selection", ["sample", "token", "batch"])
def test_gradients_reach_pool_linear_layer_and_router(selection):
    layer = expert_layer(
        selection, dtype=torch.float64, experts=6, k=3, scaling=nn.Parameter(torch.tensor(0.7).double())
    )
    layer.eval()
    names, values = zip(*layer.named_parameters(), strict=True)
    assert {"scoring.weight", "scoring.bias", "experts_A", "experts_B", "scaling", "weight", "bias"} == set(names)
    x = torch.randn(2, 3, 37, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    torch.autograd.gradcheck(call, (x, *(v.detach().requires_grad_() for v in values)), fast_mode=True)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_of_unit_weights_the_router_learns_nothing():
    layer = expert_layer("sample", "unit")
    layer(torch.randn(3, 2, 37)).sum().backward()
    assert layer.scoring.weight.grad is None and layer.experts_A.grad.any()


@pytest.mark.parametrize("selection", ["sample", "token", "batch"])
def test_counts_are_of_samples_or_tokens_and_of_training_alone(selection):
    layer, x = expert_layer(selection), torch.randn(4, 7, 37)
    layer.eval()(x)
    assert layer.activation_counts.dtype == torch.int64 and not layer.activation_counts.any()
    layer.train()(x)
    indices = layer.chosen(x).indices
    expected = torch.bincount(indices.flatten(), minlength=23)
    assert torch.equal(layer.activation_counts, expected) and expected.sum() == (28 if selection == "token" else 4) * 5
    with torch.no_grad():
        layer(x)
    assert torch.equal(layer.activation_counts, 2 * expected) and not layer.activation_counts.requires_grad
    assert layer.top_experts().tolist() == best(expected.tolist(), 5)
    assert layer.top_experts(2).tolist() == best(expected.tolist(), 2)
    layer.reset_activation_counts()
    assert not layer.activation_counts.any()


def test_a_call_that_fails_is_not_counted():
    layer = expert_layer("sample", scoring=lambda x: (torch.full((4, 5), 23), torch.ones(4, 5)))
    with pytest.raises(IndexError, match="got 23, expected 0 <= index < 23"):
        layer(torch.randn(4, 7, 37))
    assert not layer.activation_counts.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients_and_counts_once(reentrant):
    layer, twin, x = expert_layer("token"), expert_layer("token"), torch.randn(4, 7, 37)
    for net, call in ((layer, layer), (twin, lambda x: checkpoint(twin, x, use_reentrant=reentrant))):
        call(x.requires_grad_()).square().sum().backward()
        assert net.activation_counts.sum() == 4 * 7 * 5
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(layer.parameters(), twin.parameters(), strict=True))
    assert torch.equal(layer.activation_counts, twin.activation_counts)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("selection", "weights"), SETTINGS)
def test_compiled_whole_it_is_the_same(selection, weights):
    layer, twin, x = expert_layer(selection, weights), expert_layer(selection, weights), torch.randn(4, 7, 37)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for call in (layer, compiled):
        call(x).square().sum().backward()
    assert torch.equal(layer.activation_counts, twin.activation_counts) and layer.activation_counts.any()
    assert torch.equal(layer.experts_B.grad, twin.experts_B.grad) and layer.experts_B.grad.any()
    for net in (layer, twin, compiled):
        net.eval()
    assert torch.equal(layer(x), compiled(x))


@pytest.mark.parametrize("selection", ["sample", "token"])
def test_under_autocast_the_router_chooses_as_ever(selection):
    layer, x = expert_layer(selection), torch.randn(4, 7, 37)
    with torch.autocast("cpu", torch.bfloat16):
        y, chosen = layer(x), layer.chosen(x)
        base_output = F.linear(x, layer.weight, layer.bias)
    expected = layer.chosen(x)
    assert torch.equal(chosen.indices, expected.indices) and torch.equal(chosen.gates, expected.gates)
    inputs = function_inputs(layer, x) | {"x": x.bfloat16(), "base_output": base_output}
    assert_parity({"y": y.detach()}, inputs, reference=reference)


def test_under_autocast_x_may_be_in_16_bit_already():
    layer, x = expert_layer("token"), torch.randn(4, 7, 37).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, inputs = layer(x), function_inputs(layer, x)
    assert inputs["base_output"].dtype == torch.bfloat16
    assert_parity({"y": y.detach()}, inputs, reference=reference)


def test_a_given_scoring_may_return_scores_or_pairs_of_samples_or_of_tokens():
    """Of a sample the first token counts."""
    x = torch.randn(4, 7, 37)
    scores = torch.randn(4, 7, 23)
    per_token, per_sample = (
        expert_layer("token", scoring=lambda x: scores),
        expert_layer("sample", scoring=lambda x: scores),
    )
    assert per_token.chosen(x).indices.tolist() == [[best(t.tolist(), 5) for t in s] for s in scores]
    assert per_sample.chosen(x).indices.tolist() == [best(s.tolist(), 5) for s in scores[:, 0]]
    pooled = expert_layer("sample", scoring=lambda x: scores.mean(1))
    assert pooled.chosen(x).indices.tolist() == [best(s.tolist(), 5) for s in scores.mean(1)]
    indices, gates = torch.randint(23, (4, 7, 5), dtype=torch.int32), torch.randn(4, 7, 5)
    for layer, expected in (
        (expert_layer("token", scoring=lambda x: (indices, gates)), (indices, gates)),
        (expert_layer("sample", scoring=lambda x: (indices, gates)), (indices[:, 0], gates[:, 0])),
    ):
        assert all(torch.equal(a, b) for a, b in zip(layer.chosen(x), expected, strict=True))
        assert_parity({"y": layer(x).detach()}, function_inputs(layer, x), reference=reference)
    assert expert_layer("token", "unit", scoring=lambda x: (indices, gates)).chosen(x).gates is None


def test_scores_in_16_bit_have_their_softmax_in_fp32():
    scores = torch.randn(4, 23).bfloat16()
    chosen = expert_layer("sample", scoring=lambda x: scores).chosen(torch.randn(4, 7, 37))
    assert torch.equal(chosen.gates, scores.float().softmax(-1).gather(-1, chosen.indices))


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
def test_explain_names_what_then_runs(backend):
    layer, x = expert_layer(backend=backend), torch.randn(4, 7, 37)
    with dispatched() as ran:
        choice = ck.explain(layer, x)
    assert not ran
    with dispatched() as ran:
        layer(x)
    names = {call.split(".")[1] for call in ran}
    module = {"aten": {"aten"}, "native": {"native"}, "reference": set()}[choice.backend]
    assert names == module and choice.strategy and f"path={choice.backend}" in repr(layer)
    layer.eval().merge()
    assert "merged" in ck.explain(layer, x).reason


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_repr_of_a_layer_whose_backend_cannot_run(backend, monkeypatch):
    monkeypatch.setattr("clora_kernels.kernels.rank1_experts.native.is_compiled", lambda device_type: False)
    monkeypatch.setattr("clora_kernels.dispatch.rank1_experts.why_not_triton", lambda *_: "its kernels run on a GPU")
    layer = expert_layer(backend=backend)
    assert f"path={backend} (unavailable)" in repr(layer)
    for call in (layer, lambda x: ck.explain(layer, x)):
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot run rank1_experts"):
            call(torch.randn(4, 7, 37))


@pytest.mark.parametrize(
    ("kw", "error", "message"),
    [
        ({"experts": 0}, ValueError, "experts: got 0, expected an int of at least 1"),
        ({"experts": 4.0}, ValueError, r"experts: got 4\.0"),
        ({"experts": True}, ValueError, "experts: got True"),
        ({"k": 24}, ValueError, "k: got 24, expected an int from 1 to 23, the number of experts"),
        ({"k": None}, ValueError, "k: got None"),
        ({"selection": "row"}, ValueError, "selection: got 'row', expected one of 'sample', 'token', 'batch'"),
        ({"weights": None}, ValueError, "weights: got None, expected one of 'probability', 'unit'"),
        ({"scaling": torch.ones(2)}, ValueError, "scaling: got torch.float32 of shape"),
        ({"scaling": "a"}, TypeError, "scaling: got str"),
        ({"adapter_dtype": torch.int32}, ValueError, r"adapter_dtype: got torch\.int32"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
        ({"scoring": 3}, TypeError, "scoring: got int, expected a module or function of x, or None"),
        ({"scoring": ProductKeyScores(37, 25, 5)}, ValueError, "scoring: got product keys of 25 experts, 1·5 a row"),
        ({"experts": 25, "scoring": ProductKeyScores(37, 25, 5, heads=2)}, ValueError, "2·5 a row, expected of 25, 5"),
    ],
)
def test_constructors_name_what_is_wrong(kw, error, message):
    options = {"experts": 23, "k": 5, **kw}
    with pytest.raises(error, match=message):
        Rank1ExpertLinear(37, 29, **options)
    with pytest.raises(error, match=message):
        Rank1ExpertLinear.from_linear(nn.Linear(37, 29), **options)
