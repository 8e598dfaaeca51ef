"""backend="composite", a plain call as matmuls of ATen: parity, derivatives of any order, when it is taken."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAYOUTS, call, dy_for, laid_out, made, tensors_of
from torch.utils.checkpoint import checkpoint

from clora_kernels import RoutedLoRA, explain, routed_lora_linear, routed_lora_linear_group
from clora_kernels.kernels.routed_lora import composite
from clora_kernels.testing import assert_fidelity, assert_parity, dispatched, unchanged

NAMES = ("x", "weight", "lora_A", "lora_B", "bias", "scaling")
RAN = ["routed_lora.composite.forward"]
run = partial(call, backend="composite")

OPTIONS = {
    "plain": {},
    "no bias, scaling learns": {"bias": False, "scaling": None},
    "dropout": {"dropout_p": 0.3, "scaling": None},
    "all drops": {"dropout_p": 1.0},
    "delta": {"weight": False, "scaling": 0.6},
    "delta onto base": {"weight": False, "base_output": "x", "dropout_p": 0.2},
}


def plain(lead=(3, 7), dtypes="fp32", **options):
    if options.get("base_output"):
        options["base_output"] = torch.float64 if dtypes == "fp64" else torch.float32
    return made(lead, dtypes=dtypes, routing=False, **options)


@pytest.mark.parametrize("dtypes", ["fp32", "fp64"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lead", [(3, 7), (1,), (0, 2), (), (2, 3, 1, 5)], ids=str)
def test_parity(device, lead, options, dtypes):
    inputs = plain(lead, dtypes, device=device, **OPTIONS[options])
    dy = dy_for(inputs)
    with unchanged(dy, *tensors_of(inputs)), dispatched() as ran:
        assert_parity(run, inputs, dy=dy)
    assert ran == RAN


@pytest.mark.parametrize("strength", [1e-3, 1.0])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_adapter_comes_through_whole(device, dropout_p, strength):
    inputs = plain((4, 100), K=193, N=271, r=7, dropout_p=dropout_p, strength=strength, device=device)
    assert_fidelity(run(**inputs), **inputs)


@given(
    lead=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    K=st.integers(1, 40),
    N=st.integers(1, 40),
    r=st.integers(1, 20),
    name=st.sampled_from(["x", "weight", "lora_A", "lora_B", "bias", "dy"]),
    layout=st.sampled_from([layout for layout in LAYOUTS if layout != "contiguous"]),
    dropout_p=st.sampled_from([0.0, 0.4]),
)
@settings(deadline=None, max_examples=40)
def test_any_shape_and_strides(lead, K, N, r, name, layout, dropout_p):
    inputs = plain(lead, K=K, N=N, r=r, dropout_p=dropout_p)
    if name != "dy":
        inputs[name] = laid_out(inputs[name], layout)
    assert_parity(run, inputs, dy=dy_for(inputs, layout if name == "dy" else "contiguous"))


@pytest.mark.parametrize("options", OPTIONS)
def test_derivatives_of_any_order(device, options):
    inputs = plain((2, 3), "fp64", K=4, N=3, r=2, device=device, **OPTIONS[options])
    names = [name for name in (*NAMES, "base_output") if isinstance(inputs.get(name), torch.Tensor)]
    leaves = [inputs[name].detach().clone().requires_grad_() for name in names]

    def fn(*args):
        return run(**{**inputs, **dict(zip(names, args, strict=True))})

    assert torch.autograd.gradcheck(fn, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize("which", ["x", "lora_A", "lora_B", "weight", "bias"])
def test_vmap_over_one_argument_alone(device, which):
    """Also where y has no batch of its own before the adapter is added."""
    inputs = plain((4,), bias=True, device=device)
    several = torch.stack([inputs[which], 2 * inputs[which], -inputs[which]])
    got = torch.func.vmap(lambda t: run(**{**inputs, which: t}))(several)
    expected = torch.stack([run(**{**inputs, which: t}) for t in several])
    torch.testing.assert_close(got, expected)
    seed = torch.tensor(5, device=device)
    dropped = torch.func.vmap(lambda t: run(**{**inputs, which: t}, dropout_p=0.5, dropout_seed=seed))(several)
    alone = run(**{**inputs, which: several[1]}, dropout_p=0.5, dropout_seed=seed)
    torch.testing.assert_close(dropped[1], alone)


@pytest.mark.parametrize("lead", [(), (7,), (3, 5)], ids=str)
def test_y_is_no_view(device, lead):
    """As y of nn.Linear without a bias, which may be changed in place wherever it was made."""
    inputs = plain(lead, bias=False, device=device)
    x, factor = inputs.pop("x").requires_grad_(), torch.ones(29, device=device, requires_grad=True)
    with torch.no_grad():
        y = run(x, **inputs)
    y *= factor
    y.sum().backward()
    assert factor.grad.shape == (29,)
    y = checkpoint(lambda x: run(x, **inputs), x, use_reentrant=True)
    y += 1
    assert run(x, **inputs).detach_()._base is None


def test_y_can_be_changed_in_place(device):
    inputs = plain(device=device)
    x = inputs["x"].requires_grad_()
    y = run(**inputs)
    y.mul_(2.0).add_(1.0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(2 * run(**inputs).sum(), x)
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("options", ["plain", "no bias, scaling learns", "dropout", "delta", "delta onto base"])
def test_a_graph_has_the_same_results(device, options):
    torch._dynamo.reset()
    inputs = plain(device=device, **OPTIONS[options])
    assert_parity(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs, dy=dy_for(inputs))


def auto_of(M, K=48, N=48, learns=False, **options):
    x = torch.zeros(1, 1).expand(M, K)
    adapter = torch.zeros(4, K), torch.zeros(1, 1, requires_grad=learns).expand(N, 4).contiguous()
    return explain(routed_lora_linear, x, torch.zeros(1, 1).expand(N, K), *adapter, **options).backend


def test_auto_takes_it_where_there_is_next_to_nothing_to_compute():
    for learns, most in ((False, composite._MOST_ELEMENTS), (True, composite._MOST_LEARNING)):
        for drops in ({}, {"dropout_p": 0.1}):
            assert auto_of(most // 64, 32, 32, learns, **drops) == "composite"
            assert auto_of(most // 64 + 1, 32, 32, learns, **drops) != "composite"
            with torch.no_grad():
                assert auto_of(most // 64 + 1, 32, 32, learns, **drops) != ("native" if learns else "composite")
    for M, large in ((1, 1 << 19), (2, 1 << 19), (3, 1 << 21), (8, 1 << 21), (9, None)):
        N = (large or 1 << 21) // 1024
        assert (auto_of(M, 1024, N) == "composite") == (M == 9) and auto_of(M, 1024, N - 1) == "composite"


def test_a_graph_never_has_it_by_itself():
    """There it would be taken for any number of rows."""
    torch._dynamo.reset()
    graphs, inputs = [], plain()
    torch.compile(routed_lora_linear, fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)(**inputs)
    assert "clora_kernels.routed_lora" in graphs[0].code


def test_a_graph_is_one_for_every_number_of_a_dynamic_scaling():
    torch._dynamo.reset()
    graphs, inputs, compiler = [], plain((2,)), torch._dynamo.lookup_backend("aot_eager")
    fn = torch.compile(run, fullgraph=True, backend=lambda g, inputs: graphs.append(g) or compiler(g, inputs))
    for step, rows in enumerate((2, 3, 8, 64, 65, 1000)):
        call = {**inputs, "x": torch.randn(rows, inputs["x"].shape[1]), "scaling": 1.0 + 0.3 * step}
        torch.testing.assert_close(fn(**call), run(**call))
    assert len(graphs) <= 3 and all("addmm" in g.code for g in graphs)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"routing": torch.eye(5)}, "it has no routing and no gate; use 'auto' or 'aten'"),
        ({"gate": torch.ones(5)}, "it has no routing and no gate"),
        ({"lora_A": torch.ones(5, 41).double()}, r"adapter, bias and base_output in the dtype of x, torch\.float32"),
        ({"lora_B": torch.ones(29, 5).bfloat16()}, "adapter, bias and base_output in the dtype of x"),
        ({"bias": torch.ones(29).bfloat16()}, "adapter, bias and base_output in the dtype of x"),
        (dict(zip(("x", "weight"), torch.ones(2, 29, 41).half(), strict=True)), r"round an adapter of torch\.float16"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_named_it_refuses_what_it_lacks(changed, why, compiled):
    inputs, fn = {**plain(), **changed}, partial(routed_lora_linear, backend="composite")
    if compiled:
        torch._dynamo.reset()
        fn = torch.compile(fn, fullgraph=True, backend="eager")
    with pytest.raises(Exception if compiled else ValueError, match=why):
        fn(**inputs)
    assert explain(routed_lora_linear, **inputs).backend != "composite", "auto takes another"
    assert routed_lora_linear(**inputs).shape == (*inputs["x"].shape[:-1], 29)


def test_no_other_operation_knows_it():
    from clora_kernels import gram_schmidt, rank1_experts

    with pytest.raises(ValueError, match="backend: got 'composite', expected one of"):
        gram_schmidt(torch.randn(5, 2), backend="composite")
    with pytest.raises(ValueError, match="backend: got 'composite', expected one of"):
        rank1_experts(*torch.randn(2, 3, 4), torch.randn(3, 4), torch.zeros(3, 1).long(), backend="composite")


def test_a_group_is_each_of_its_layers():
    inputs = plain()
    j = RoutedLoRA(*(inputs[name] for name in ("weight", "lora_A", "lora_B")), bias=inputs["bias"], scaling=0.3)
    with dispatched() as ran:
        ys = routed_lora_linear_group(inputs["x"], [j, j._replace(scaling=-1.0)])
    assert ran == RAN * 2
    for y, scaling in zip(ys, (0.3, -1.0), strict=True):
        assert torch.equal(y, run(**{**inputs, "scaling": scaling}))
