"""DAC's layer: whom it chooses, its two operations, gradients, counting, merging, state, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from layers import best, randomize, same_bits, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from clora_kernels import dropout_mask, explain
from clora_kernels.continual import DACLinear, assert_model_parity
from clora_kernels.modules.inject import lora_state_dict
from clora_kernels.testing import assert_parity

SHAPES = [(11,), (5, 11), (5, 3, 11), (4, 2, 3, 11)]
SETTINGS = [(s, w) for s in ("batch", "sample") for w in ("unit", "probability")]
P = 0.25  # which the mask draws as it is: 1/(1 − p) is that of the formulas


def layer_of(
    selection: str = "batch", weights: str = "unit", dtype: torch.dtype = torch.float64, **options
) -> DACLinear:
    torch.manual_seed(0)
    options = {"r": 6, "k": 3, "keep": 2, "dropout_p": P, "scaling": 0.7, **options}
    layer = randomize(DACLinear(11, 7, dtype=dtype, selection=selection, weights=weights, **options))
    layer.activation_counts.zero_()
    return layer


def results(layer: DACLinear, x: Tensor, dy: Tensor, seed: Tensor | None = None) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x, dropout_seed=seed)
    y.backward(dy)
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def test_it_starts_as_the_linear_layer_with_a_router_of_its_own() -> None:
    linear, x = nn.Linear(11, 7), torch.randn(5, 3, 11)
    layer = DACLinear.from_linear(linear)
    assert layer.weight is linear.weight and layer.scaling == 1 / 12 and layer.dropout_p == 0.2
    assert (layer.r, layer.k, layer.keep) == (12, 8, 4) and layer.router.weight.shape == (12, 11)
    torch.testing.assert_close(layer(x), linear(x))
    names = ["activation_counts", "lora_A", "lora_B", "router.bias", "router.weight"]
    assert sorted(layer.adapter_state_dict()) == names
    assert len(list(layer.adapter_parameters())) == 4 and type(layer.to_linear()) is nn.Linear
    assert "k=8, keep=4, selection=batch, weights=unit, operation=routed_lora" in repr(layer)


@pytest.mark.parametrize(("selection", "weights"), SETTINGS)
def test_the_choice_by_hand(selection: str, weights: str) -> None:
    """Sample by sample, from scores that only the first token and only what is not dropped can have made."""
    layer, x, seed = layer_of(selection, weights), torch.randn(5, 3, 11).double(), torch.tensor(3)
    mask = dropout_mask(x, P, seed)
    scores = F.linear((x * mask / (1 - P))[:, 0], layer.router.weight, layer.router.bias)
    own = [best(row, 3) for row in scores.tolist()]
    counts = [sum(i in row for row in own) for i in range(6)]
    assert len({tuple(sorted(row)) for row in own}) > 1
    used = own if selection == "sample" else [best(counts, 3)] * 5
    gate = torch.zeros(5, 6).double()
    for s, row in enumerate(used):
        for i in row:
            gate[s, i] = 1 if weights == "unit" else scores.softmax(-1)[s, i]
    p = (x * mask / (1 - P)) @ layer.lora_A.mT * gate[:, None]
    torch.testing.assert_close(
        layer(x, dropout_seed=seed), F.linear(x, layer.weight, layer.bias) + 0.7 * p @ layer.lora_B.mT
    )
    assert layer.activation_counts.tolist() == counts
    layer(x, dropout_seed=seed)
    assert layer.activation_counts.tolist() == [2 * n for n in counts]


@pytest.mark.parametrize("selection", ["batch", "sample"])
def test_of_equal_scores_and_counts_the_lowest_index_goes_first(selection: str) -> None:
    layer, x = layer_of(selection), torch.randn(4, 11).double()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0]))
    layer(x)
    assert layer.activation_counts.tolist() == [4, 4, 0, 4, 0, 0]
    assert layer.kept().tolist() == [0, 1]
    with torch.no_grad():  # samples 0 and 1 choose 3, 4, 5, the others 0, 1, 2: all counts are equal
        layer.router.bias.zero_()
        layer.router.weight[:3, 0], layer.router.weight[3:, 0] = 1.0, -1.0
        x[:, 0] = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    layer.dropout_p = 0.0
    gate = layer.call_arguments(x)["gate"].expand(4, 6)
    low, high = [1.0] * 3 + [0.0] * 3, [0.0] * 3 + [1.0] * 3
    assert gate.tolist() == ([low] * 4 if selection == "batch" else [high, high, low, low])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("selection", "weights"), SETTINGS)
def test_expert_by_expert_it_is_the_same(selection: str, weights: str, shape: tuple[int, ...]) -> None:
    """y, all gradients and counts of the two operations, with dropout, in fp64."""
    x, dy, seed = torch.randn(shape).double(), torch.randn(*shape[:-1], 7).double(), torch.tensor(5)
    found = []
    for operation in ("routed_lora", "rank1_experts"):
        layer = layer_of(selection, weights, operation=operation)
        found.append({**results(layer, x, dy, seed), "counts": layer.activation_counts})
    assert found[0].keys() == found[1].keys() and found[0]["counts"].sum() == (1 if len(shape) == 1 else shape[0]) * 3
    assert ("router.weight" in found[0]) == (weights == "probability")
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor)
    assert not torch.allclose(found[0]["y"], results(layer_of(selection, weights), x, dy, torch.tensor(6))["y"])


@pytest.mark.parametrize("selection", ["batch", "sample"])
@pytest.mark.parametrize("operation", ["routed_lora", "rank1_experts"])
def test_both_operations_keep_to_the_parity_rule(selection: str, operation: str) -> None:
    layer = layer_of(selection, dtype=torch.float32, operation=operation)
    x, dy, seed = torch.randn(5, 3, 11), torch.randn(5, 3, 7), torch.tensor(5)
    call = layer.call_arguments(x, dropout_seed=seed)
    inputs = {
        k: v.detach() if isinstance(v, Tensor) else v for k, v in call.items() if k not in ("training", "backend")
    }
    names = ("x", "weight", "bias", "lora_A", "lora_B")
    found = results(layer, x, dy, seed)
    assert_parity({k: found[k] for k in ("y", *names)}, inputs, dy=dy, gradients=names)


@pytest.mark.parametrize("operation", ["routed_lora", "rank1_experts"])
@pytest.mark.parametrize("selection", ["batch", "sample"])
def test_gradcheck_through_the_router(selection: str, operation: str) -> None:
    layer = layer_of(selection, "probability", operation=operation, backend="reference")
    x, seed = torch.randn(3, 2, 11).double().requires_grad_(), torch.tensor(1)
    parameters = {name: p for name, p in layer.named_parameters() if name not in ("weight", "bias")}

    def call(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, named, (x,), {"dropout_seed": seed})

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


@pytest.mark.parametrize(("selection", "weights"), SETTINGS)
def test_the_router_learns_from_probabilities_alone(selection: str, weights: str) -> None:
    layer = layer_of(selection, weights)
    layer(torch.randn(5, 3, 11).double()).square().sum().backward()
    for p in layer.router.parameters():
        assert (p.grad is None) if weights == "unit" else p.grad.any()
    assert layer.lora_A.grad.any() and layer.lora_B.grad.any()


@pytest.mark.parametrize("operation", ["routed_lora", "rank1_experts"])
def test_evaluation_chooses_by_the_same_rule_and_does_not_count(operation: str) -> None:
    layer, x = layer_of("sample", operation=operation).eval(), torch.randn(5, 3, 11).double()
    scores = F.linear(x[:, 0], layer.router.weight, layer.router.bias)
    gate = torch.tensor([[float(i in best(row, 3)) for i in range(6)] for row in scores.tolist()]).double()
    expected = F.linear(x, layer.weight, layer.bias) + 0.7 * (x @ layer.lora_A.mT * gate[:, None]) @ layer.lora_B.mT
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer(x), layer(x)) and not layer.activation_counts.any()


@pytest.mark.parametrize("operation", ["routed_lora", "rank1_experts"])
def test_everything_dropped_leaves_the_linear_layer_and_the_router_its_bias(operation: str) -> None:
    layer, x = layer_of(dropout_p=1.0, operation=operation), torch.randn(5, 3, 11).double()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    chosen = best(layer.router.bias.tolist(), 3)
    assert layer.activation_counts.tolist() == [5 * (i in chosen) for i in range(6)]


@pytest.mark.parametrize("shape", [(0, 11), (0, 3, 11)], ids=str)
@pytest.mark.parametrize("operation", ["routed_lora", "rank1_experts"])
def test_no_samples_are_no_trouble(shape: tuple[int, ...], operation: str) -> None:
    for selection, weights in SETTINGS:
        layer = layer_of(selection, weights, operation=operation)
        assert layer(torch.zeros(shape).double()).shape == (*shape[:-1], 7) and not layer.activation_counts.any()


def test_wrong_calls_are_told_and_not_counted() -> None:
    layer, x = layer_of(), torch.randn(5, 3, 11).double()
    for arguments, error, message in (
        ({"x": x[..., :4]}, ValueError, r"x: got shape \(5, 3, 4\), expected \[..., 11\]"),
        ({"x": x.float()}, TypeError, "x: got dtype torch.float32, expected torch.float64"),
        ({"x": x[:, :0]}, ValueError, r"x: got shape \(5, 0, 11\), expected a token by which a sample chooses"),
        ({"x": x, "gate": torch.ones(6)}, ValueError, "gate: got a tensor, expected None"),
        ({"x": x, "routing_index": torch.zeros(5)}, ValueError, "routing_index: got a tensor, expected None"),
        ({"x": x, "dropout_seed": torch.zeros(2)}, ValueError, "dropout_seed: got torch.float32 of shape"),
    ):
        state = torch.get_rng_state()
        with pytest.raises(error, match=message):
            layer(**arguments)
        assert torch.equal(state, torch.get_rng_state()) and not layer.activation_counts.any()
    layer.merge()
    with pytest.raises(RuntimeError, match="layer is merged"):
        layer(x)
    with pytest.raises(ValueError, match="gate: got a tensor for a merged layer"):
        layer.eval()(x, gate=torch.ones(6))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("operation", ["routed_lora", "rank1_experts"])
def test_activation_checkpointing_gives_the_same_gradients_and_counts_once(reentrant: bool, operation: str) -> None:
    layer, twin = (layer_of("sample", "probability", operation=operation) for _ in range(2))
    x = torch.randn(5, 3, 11).double().requires_grad_()
    for net, call in ((layer, layer), (twin, lambda x: checkpoint(twin, x, use_reentrant=reentrant))):
        torch.manual_seed(4)
        call(x).square().sum().backward()
        assert net.activation_counts.sum() == 5 * 3
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(layer.parameters(), twin.parameters(), strict=True))
    assert torch.equal(layer.activation_counts, twin.activation_counts)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("selection", "weights", "operation"),
    [("batch", "unit", "routed_lora"), ("sample", "probability", "routed_lora"), ("sample", "unit", "rank1_experts")],
)
def test_compiled_whole_it_is_the_same(selection: str, weights: str, operation: str) -> None:
    layer, twin = (layer_of(selection, weights, operation=operation) for _ in range(2))
    compiled, x, seed = torch.compile(twin, fullgraph=True, backend="aot_eager"), torch.randn(5, 3, 11).double(), None
    for seed in (torch.tensor(5), torch.tensor(6)):
        for call in (layer, compiled):
            call(x, dropout_seed=seed).square().sum().backward()
    assert torch.equal(layer.activation_counts, twin.activation_counts) and layer.activation_counts.sum() == 2 * 15
    for (name, a), b in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or a.grad.any(), name
        torch.testing.assert_close(a.grad, b.grad)
    y = compiled(x)
    assert not torch.equal(y, compiled(x))  # a draw of its own for each call
    for net in (layer, twin, compiled):
        net.eval()
    torch.testing.assert_close(layer(x), compiled(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_it_has_the_experts_of_the_highest_counts(kind: str, dtype: torch.dtype) -> None:
    base = (nn.Linear(11, 7) if kind == "linear" else Conv1D(7, 11)).to(dtype)
    layer = randomize(DACLinear.from_linear(base, r=6, k=3, keep=2, scaling=0.7))
    layer.activation_counts.copy_(torch.tensor([1, 5, 0, 9, 5, 0]))
    A, B = layer.lora_A.detach()[[3, 1]], layer.lora_B.detach()[:, [3, 1]]
    before, update = snapshot(layer), 0.7 * (A.mT @ B.mT if kind == "conv1d" else B @ A)
    layer.eval().merge()
    torch.testing.assert_close(layer.weight.detach(), before["weight"] + update)
    x = torch.randn(5, 11, dtype=dtype)
    assert torch.equal(layer(x), layer.to_linear()(x))
    assert same_bits(layer.state_dict(), before)
    merged = layer.weight.detach().clone()
    layer.unmerge()
    assert same_bits(snapshot(layer), before)
    exported = lora_state_dict(nn.Sequential(layer))
    a, b = (exported[f"base_model.model.0.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(0.7 * b @ a, update.mT if kind == "conv1d" else update)
    router = layer.router.weight.clone()
    layer.fold()
    assert torch.equal(layer.weight, merged) and not layer.lora_B.any() and not layer.activation_counts.any()
    assert layer.lora_A.any() and not torch.equal(layer.router.weight, router) and layer.router.weight.any()


def test_a_plain_checkpoint_loads_and_an_adapters_own_too() -> None:
    layer, plain = layer_of(dtype=torch.float32), nn.Linear(11, 7)
    adapter = {k: v.clone() for k, v in layer.adapter_state_dict().items()}
    nn.Sequential(layer).load_state_dict(nn.Sequential(plain).state_dict())
    assert torch.equal(layer.weight, plain.weight) and same_bits(layer.adapter_state_dict(), adapter)
    other = DACLinear(11, 7, r=6, k=3, keep=2)
    other.load_state_dict(layer.state_dict())
    assert same_bits(other.state_dict(), layer.state_dict())
    twin = copy.deepcopy(layer)
    twin.lora_A.data.zero_()
    assert layer.lora_A.any() and twin.router is not layer.router
    with pytest.raises(ValueError, match=r"missing \['router.bias'\]"):
        layer.load_adapter_state_dict({k: v for k, v in adapter.items() if k != "router.bias"})


def test_parity_of_a_models_layers_and_what_runs_can_be_asked() -> None:
    model = nn.Sequential(layer_of("sample", "probability"), nn.Tanh(), nn.Linear(7, 2).double())
    proved = assert_model_parity(model, lambda: model(torch.randn(5, 3, 11).double()).square().sum())
    assert {"y", "x", "lora_A", "lora_B", "gate"} <= set(proved["0"])
    counts = model[0].activation_counts.clone()
    assert explain(model[0], torch.randn(5, 3, 11).double()).backend in ("aten", "native")
    assert torch.equal(model[0].activation_counts, counts)
    model.eval()[0].merge()
    assert "merged" in str(explain(model[0], torch.randn(5, 11).double()))
