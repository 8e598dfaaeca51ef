"""backend="composite", a plain call as matmuls of ATen: parity, derivatives of any order, when it is taken."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAYOUTS, call, dy_for, laid_out, made, tensors_of
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from clora_kernels import RoutedLoRA, RoutedLoRALinear, explain, routed_lora_linear, routed_lora_linear_group
from clora_kernels.autograd.routed_lora import functions
from clora_kernels.kernels.routed_lora import composite, layer
from clora_kernels.testing import assert_fidelity, assert_parity, dispatched, evaluate, saved_tensors, unchanged

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


GLANCES = {
    "plain": {},
    "no bias": {"bias": None},
    "dropout": {"dropout_p": 0.25},
    "all drops": {"dropout_p": 1.0},
    "not training": {"dropout_p": 0.25, "training": False},
}


@pytest.mark.parametrize("options", GLANCES)
@pytest.mark.parametrize("dtypes", ["fp32", "fp64", "bf16+fp32", "fp16+fp32"])
@pytest.mark.parametrize("rows", [21, 600])
@pytest.mark.parametrize("learns", [True, False])
def test_what_is_seen_at_a_glance_has_the_bits_of_a_closer_look(monkeypatch, options, dtypes, rows, learns):
    inputs = {**plain((3, rows // 3), dtypes=dtypes), **GLANCES[options]}
    names = [name for name in NAMES[:5] if inputs[name] is not None] if learns else []
    dy = dy_for(inputs) if names else None
    of_native = dtypes != "fp64" and layer.is_built()
    seen = (
        of_native
        or ("16" not in dtypes and rows * (41 + 29) <= composite._MOST_LEARNING)
        or (dtypes == "fp64" and not learns)
    )
    looked = []
    closer = functions.run
    monkeypatch.setattr(functions, "run", lambda *args: looked.append(args) or closer(*args))
    torch.manual_seed(3)
    with dispatched() as ran:
        glance = evaluate(routed_lora_linear, inputs, dy, names)
    after = torch.rand(())
    assert bool(looked) != seen
    monkeypatch.setattr(functions, "run_plain", lambda *args: None)
    torch.manual_seed(3)
    with dispatched() as then:
        found = evaluate(routed_lora_linear, inputs, dy, names)
    assert looked and torch.rand(()) == after, "as many draws"
    assert all(torch.equal(glance[name], found[name]) for name in glance) and ran == then


class Ignoring(torch.autograd.Function):
    """Has no gradient for what it was given."""

    @staticmethod
    def forward(ctx, y):
        return y.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


SUBSETS = [names for n in range(1, 6) for names in combinations(NAMES[:5], n)]


@pytest.mark.skipif(not layer.is_built(), reason="the compiled part is not there")
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_compiled_layer_seen_at_a_glance(dtypes, dropout_p):
    """Every subset of gradients, what is saved for it, a graph of the backward, and a second differentiation."""
    inputs = {**plain((600,), dtypes), "dropout_p": dropout_p}
    dy = dy_for(inputs)
    for subset in SUBSETS:
        torch.manual_seed(2)
        leaves = {k: v.detach().requires_grad_(k in subset) if k in NAMES[:5] else v for k, v in inputs.items()}
        with saved_tensors() as saved:
            y = routed_lora_linear(**leaves)
        assert "PlainLayer" in type(y.grad_fn).__name__
        assert saved.holds(inputs["x"]) == bool({"weight", "lora_A"} & set(subset)), subset
        assert (600, 29) not in [tuple(t.shape) for t in saved.tensors]
        grads = torch.autograd.grad(y, [leaves[k] for k in subset], dy, retain_graph=True)
        again = torch.autograd.grad(y, [leaves[k] for k in subset], dy, create_graph=True)
        torch.manual_seed(2)
        expected = evaluate(closer_look, inputs, dy, subset)
        for name, grad, graphed in zip(subset, grads, again, strict=True):
            assert torch.equal(grad, expected[name]) and torch.equal(graphed, grad), (subset, name)
            assert grad.dtype == inputs[name].dtype and grad.is_contiguous()
        if len(subset) == 5:
            with pytest.raises(RuntimeError, match="double backward is not supported"):
                again[0].sum().backward()
    (unused,) = torch.autograd.grad(leaves["x"].sum() + Ignoring.apply(y), leaves["x"])
    assert torch.equal(unused, torch.ones_like(unused))


@pytest.mark.parametrize("backend", ["composite", "aten", "reference", *(["native"] if layer.is_built() else [])])
@pytest.mark.parametrize("nothing", [{"scaling": 0.0}, {"dropout_p": 1.0}], ids=str)
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_what_counts_nothing_hides_no_nan(backend, nothing, name):
    inputs = {**plain((21,)), **nothing}
    frozen = torch.nn.functional.linear(inputs["x"], inputs["weight"], inputs["bias"])
    torch.testing.assert_close(routed_lora_linear(**inputs, backend=backend), frozen)
    inputs[name][3, 2] = float("nan")
    y = routed_lora_linear(**inputs, backend=backend)
    assert (y.isnan() if name == "lora_A" else y[:, 3].isnan()).all()


def test_a_bias_of_another_dtype_is_added_as_it_is():
    inputs = plain(dtypes="fp32")
    inputs["bias"] = inputs["bias"].bfloat16()
    for rows in (21, 600):
        x = torch.randn(rows, 41)
        assert_parity(routed_lora_linear, {**inputs, "x": x}, dy=torch.randn(rows, 29))


def closer_look(**inputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "run_plain", lambda *args: None)
        return routed_lora_linear(**inputs)


SIXTEEN = {"x": torch.ones(3, 7, 41).bfloat16(), "weight": torch.ones(29, 41).bfloat16()}


@pytest.mark.parametrize(
    "changed",
    [
        {"scaling": 2},
        {"scaling": torch.tensor(0.5)},
        {"dropout_p": 0},
        {"dropout_p": 0.5, "dropout_seed": torch.tensor(1)},
        {"x": torch.ones(7, 41).to_sparse()},
        {"x": torch.ones(7, 40)},
        {"x": torch.ones(7, 41).bfloat16()},
        {"x": torch.ones(7, 41).int(), "weight": torch.ones(29, 41).int()},
        {**SIXTEEN, "lora_A": torch.ones(41, 5).mT},
        {**SIXTEEN, "lora_B": torch.ones(29, 5).double()},
        {"x": torch.tensor(1.0)},
        {"x": [1.0]},
        {"weight": None},
        {"weight": torch.ones(29, 41).double()},
        {"lora_A": torch.ones(0, 41)},
        {"lora_A": torch.ones(5, 41).double()},
        {"lora_B": torch.ones(29, 5).bfloat16()},
        {"lora_B": torch.ones(29, 4)},
        {"bias": torch.ones(1)},
        {"bias": torch.ones(29).int()},
        {"bias": torch.ones(29, device="meta")},
        {"dropout_p": -0.1},
        {"dropout_p": 1.1},
        {"dropout_p": float("nan")},
        {"dropout_p": "0.1"},
        {"training": 1},
        {"backend": "aten"},
        {"backend": "composite"},
        {"routing": torch.eye(5)},
        {"gate": torch.ones(5)},
    ],
    ids=lambda changed: ", ".join(f"{k}={type(v).__name__}" for k, v in changed.items()),
)
def test_everything_else_gets_a_closer_look(monkeypatch, changed):
    looked, closer = [], functions.run
    monkeypatch.setattr(functions, "run", lambda *args: looked.append(args) or closer(*args))
    inputs = {**plain(), **changed}
    try:
        y = routed_lora_linear(**inputs)
    except (TypeError, ValueError) as error:
        assert str(error).split(":")[0] in (*NAMES, "dropout_p", "training"), error
    else:
        assert looked and y.shape == (3, 7, 29)


def test_in_16_bit_a_glance_leaves_what_the_compiled_call_does_not_do(monkeypatch):
    inputs = {**plain(), **SIXTEEN}
    x = inputs.pop("x")
    with pytest.raises(RuntimeError, match=r"torch\.func\.vmap .* pass backend='reference'"):
        torch.func.vmap(lambda x: routed_lora_linear(x, **inputs))(x)
    with pytest.raises(RuntimeError, match="forward mode"):
        torch.func.jvp(lambda x: routed_lora_linear(x, **inputs), (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode"):
        routed_lora_linear(forward_ad.make_dual(x, x), **inputs)
    monkeypatch.setattr(layer, "LITTLE_WORK", 0)
    with dispatched() as ran:
        routed_lora_linear(x, **inputs)
    assert explain(routed_lora_linear, x, **inputs).backend == "aten" and "routed_lora.aten.linear" in ran


def test_under_autocast_it_is_the_16_bit_layer():
    inputs = plain()
    with torch.autocast("cpu", torch.bfloat16), dispatched() as ran:
        y = routed_lora_linear(**inputs)
    assert y.dtype == torch.bfloat16 and RAN[0] not in ran


def test_the_layer_takes_it():
    layer, x = RoutedLoRALinear(8, 6, 4, routing=False, dropout_p=0.5), torch.randn(5, 8)
    with dispatched() as ran:
        layer(x), layer.eval()(x)
    assert ran == RAN * 2
