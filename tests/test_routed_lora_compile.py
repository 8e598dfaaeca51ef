"""Routed LoRA under torch.compile: one graph, the bits and masks of eager mode, no graph for each value or size."""

from __future__ import annotations

import pytest
import torch
from strategies import DTYPES, call, dy_for
from torch._dynamo.testing import CompileCounterWithBackend

from clora_kernels import RoutedLoRA, routed_lora_linear, routed_lora_linear_group
from clora_kernels.reference.routed_lora_samples import make_inputs, sample_inputs
from clora_kernels.testing import assert_parity

OPTIONS = {
    "plain": {"routing": False},
    "everything": {"frozen": True, "gate": (3, 1, 5), "scaling": None, "dropout_p": 0.3},
    "bank": {"bank": 3, "scaling": None},
    "delta": {"weight": False, "base_output": torch.float32},
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize("options", OPTIONS)
def test_fullgraph_forward_and_backward(device, options, dtypes):
    dtype, adapter_dtype = DTYPES[dtypes]
    inputs = make_inputs(**OPTIONS[options], dtype=dtype, adapter_dtype=adapter_dtype, device=device)
    assert_parity(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs, dy=dy_for(inputs))


@pytest.mark.parametrize("name", [name for name, _ in sample_inputs()])
def test_fullgraph_of_every_sample(device, name):
    inputs = dict(sample_inputs(device=device))[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    if name == "plain_lora":  # "auto" is "composite", whose scaling is a number of the matmul where there is no graph
        assert_parity(compiled, inputs, dy=dy_for(inputs))
    else:
        assert torch.equal(compiled(**inputs), call(**inputs))


def test_inductor(device):
    inputs = make_inputs(**OPTIONS["everything"], device=device)
    inputs["x"].requires_grad_()
    inputs["lora_A"].requires_grad_()

    def loss(inputs):
        return torch.nn.functional.silu(routed_lora_linear(**inputs) + 1).sum()

    value, expected = torch.compile(loss, fullgraph=True)(inputs), loss(inputs)
    torch.testing.assert_close(value, expected)
    grads, expected_grads = (torch.autograd.grad(v, [inputs["x"], inputs["lora_A"]]) for v in (value, expected))
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("learns", [True, False])
def test_group_that_shares_tensors(device, learns):
    """One gate and one scaling for all its layers."""
    layers = [make_inputs(N=N, gate=(5,), dropout_p=0.3, scaling=None, device=device, seed=N) for N in (29, 17)]
    x, gate, scaling = (layers[0][name].requires_grad_(learns) for name in ("x", "gate", "scaling"))
    shared = {"gate": gate, "scaling": scaling}
    adapters = [RoutedLoRA(**{**{k: v for k, v in layer.items() if k != "x"}, **shared}) for layer in layers]

    def run(x):
        return routed_lora_linear_group(x, adapters)

    compiled, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))
    if learns:
        got, grads = (torch.autograd.grad([y.sum() for y in ys], [x, gate, scaling]) for ys in (compiled, expected))
        assert all(torch.equal(a, b) for a, b in zip(got, grads, strict=True))


def counts(device, make_options, leads, dynamic=None, **form):
    """Graphs that a compiled layer has made after each of these leading shapes of x, with dropout, forward and
    backward."""
    counter = CompileCounterWithBackend("aot_eager")
    base = make_inputs((2,), scaling=None, **(form or {"gate": (5,)}), device=device)
    compiled = torch.compile(routed_lora_linear, fullgraph=True, backend=counter, dynamic=dynamic)
    made = []
    for step, lead in enumerate(leads):
        x = torch.randn(*lead, 41, device=device, requires_grad=True)
        options = make_options(step)
        compiled(**{**base, "x": x, **options}).sum().backward()
        assert x.grad.shape == x.shape
        made.append(counter.frame_count)
    return made


def counted(device, make_options, rows=(2, 3, 8, 64, 65, 1000), **options):
    return counts(device, make_options, [(M,) for M in rows], **options)[-1]


def one_by_one(device, floats, times=8):
    """M first, then each of these numbers, each several times: options by step, and the rows of each."""
    settings = {"M": 2, "dropout_p": 0.1, "scaling": 0.5 if "scaling" in floats else torch.tensor(0.5, device=device)}
    steps = []
    for step in [{"M": M} for M in (2, 3, 64, 1000)] + [
        {name: 0.1 * i} for name in floats for i in range(2, times + 1)
    ]:
        settings = {**settings, **step}
        steps.append(settings)
    options = [{k: v for k, v in step.items() if k != "M"} for step in steps]
    return options.__getitem__, [step["M"] for step in steps]


@pytest.mark.parametrize(
    ("leads", "made"),
    [
        ([(2, 3), (2, 7), (2, 9), (5, 9), (6, 11), (9, 1000)], [1, 2, 2, 3, 3, 3]),
        ([(2, 3), (5, 7), (6, 7), (6, 11), (9, 1000)], [1, 2, 2, 2, 2]),
        ([(2, 3), (5, 7), (1, 7), (1, 9), (6, 9)], [1, 2, 3, 3, 3]),
        ([(2, 3, 4), (2, 3, 5), (2, 4, 5), (3, 5, 6), (7, 8, 9)], [1, 2, 3, 4, 4]),
    ],
    ids=["one by one", "together", "a single sample", "three"],
)
def test_each_leading_dimension_that_changes_costs_one_graph(device, leads, made):
    """Dynamo takes each size for a constant until it changes, and 1 for one always."""
    options = {"dropout_p": 0.1, "scaling": torch.tensor(0.5, device=device)}
    assert counts(device, lambda step: options, leads) == made


def test_two_graphs_for_every_size_with_a_tensor_scaling(device):
    def options(step):
        return {"dropout_p": 0.1 + 0.1 * step, "scaling": torch.tensor(1.0 + step, device=device)}

    assert counted(device, options) <= 2


def test_three_graphs_for_every_size_with_floats(device):
    assert counted(device, lambda step: {"dropout_p": 0.1 + 0.1 * step, "scaling": 1.0 + 0.3 * step}) <= 3


@pytest.mark.parametrize("floats, most", [(("dropout_p",), 3), (("dropout_p", "scaling"), 4)], ids=str)
def test_what_changes_alone_costs_one_graph(device, floats, most):
    """Dynamo takes a number for a constant until it changes: M first, then dropout, then scaling, each many times."""
    options, rows = one_by_one(device, floats)
    assert counted(device, options, rows=rows) <= most


@pytest.mark.parametrize("form", [{"gate": (5,)}, {"frozen": True}, {"routing": False}], ids=str)
@pytest.mark.parametrize("floats", [("dropout_p",), ("dropout_p", "scaling")], ids=str)
def test_a_dynamic_graph_is_one_for_every_size_and_number(device, floats, form):
    options, rows = one_by_one(device, floats)
    assert counted(device, options, rows=rows, dynamic=True, **form) == 1


def test_many_values_of_a_float_stay_in_three_graphs(device):
    """Past the recompilation limit of eight a graph per value would fail."""
    options = [{"dropout_p": 0.05 + 0.03 * i, "scaling": 1.0 + 0.3 * i} for i in range(12)]
    assert counted(device, lambda step: options[step], rows=[16] * 12) <= 3


def test_each_compiled_call_draws_its_own_mask(device):
    eye = torch.eye(33, device=device)
    ones = torch.ones(9, 33, device=device)

    def two(x):
        options = {"weight": torch.zeros_like(eye), "lora_A": eye, "lora_B": eye, "dropout_p": 0.5}
        return routed_lora_linear(x, **options), routed_lora_linear(x, **options)

    compiled = torch.compile(two, fullgraph=True)
    masks = [m > 0 for _ in range(2) for m in compiled(ones)]
    for i, mask in enumerate(masks):
        assert 0 < mask.sum() < mask.numel()
        assert not any(torch.equal(mask, other) for other in masks[:i])


def test_forward_and_backward_share_a_mask(device):
    """dx of x = 1 through A = B = I is the mask that y shows."""
    eye = torch.eye(33, device=device)
    x = torch.ones(9, 33, device=device, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        return routed_lora_linear(x, torch.zeros_like(eye), eye, eye, dropout_p=0.5)

    y = run(x)
    y.sum().backward()
    assert torch.equal(y, x.grad)


def test_no_grad_and_inference_mode(device):
    inputs = make_inputs(**OPTIONS["everything"], device=device)
    inputs["lora_A"].requires_grad_()
    compiled = torch.compile(routed_lora_linear, fullgraph=True, backend="aot_eager")
    expected = routed_lora_linear(**inputs).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(compiled(**inputs), expected)
            assert torch.equal(routed_lora_linear(**inputs), expected)
