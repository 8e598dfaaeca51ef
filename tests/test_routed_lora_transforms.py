"""Routed LoRA under autograd's and torch.func's transforms, gradcheck, opcheck and activation checkpointing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from strategies import call, dy_for
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from clora_kernels import RoutedLoRA, routed_lora_linear
from clora_kernels.autograd.routed_lora.calls import prepare
from clora_kernels.dispatch.routed_lora import pack_projections
from clora_kernels.kernels.routed_lora.algebra import Projection
from clora_kernels.reference.routed_lora_samples import make_inputs
from clora_kernels.testing import evaluate

SMALL = {"lead": (2, 3), "K": 5, "N": 4, "r": 3, "scaling": None, "dtype": torch.float64}
OPTIONS = {
    "plain": {"routing": False},
    "routed": {"gate": (2, 1, 3), "dropout_p": 0.3},
    "bank": {"bank": 2, "gate": (3,)},
    "delta": {"weight": False, "base_output": torch.float64},
}
FROZEN = {"frozen": {"frozen": True, "gate": (3,)}, "bank_frozen": {"frozen": True, "bank": 2, "gate": (2, 3, 3)}}
TRAINED = ("x", "weight", "lora_A", "lora_B", "routing", "bias", "gate", "scaling", "base_output")


def function_of(inputs, names, **options):
    """The call as a function of the named tensors alone, and those tensors."""
    names = [name for name in names if isinstance(inputs.get(name), torch.Tensor)]
    leaves = [inputs[name].detach().clone().requires_grad_() for name in names]
    return (lambda *args: call(**{**inputs, **dict(zip(names, args, strict=True))}, **options)), leaves


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(device, options, backend):
    fn, leaves = function_of(make_inputs(**SMALL, **OPTIONS[options], device=device), TRAINED, backend=backend)
    assert torch.autograd.gradcheck(fn, leaves)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("options", FROZEN)
def test_gradcheck_beside_a_frozen_routing(device, options, backend):
    """lora_A and lora_B do not learn through the frozen path, so their gradients are no derivatives of y: they are
    those of the layer without it."""
    inputs = make_inputs(**SMALL, **FROZEN[options], device=device)
    names = ("x", "weight", "routing", "bias", "gate", "scaling")
    fn, leaves = function_of(inputs, names, backend=backend)
    assert torch.autograd.gradcheck(fn, leaves)
    run = partial(call, backend=backend)
    of_whole = evaluate(run, inputs, dy_for(inputs), ["lora_A", "lora_B"])
    of_live = evaluate(run, {**inputs, "frozen_routing": None}, dy_for(inputs), ["lora_A", "lora_B"])
    fn, leaves = function_of({**inputs, "frozen_routing": None}, ("lora_A", "lora_B"), backend=backend)
    assert torch.autograd.gradcheck(fn, leaves)
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(of_whole[name], of_live[name])


@pytest.mark.parametrize("options", [*OPTIONS, *FROZEN])
def test_double_backward(device, options):
    """It raises and names the way out, which works."""
    inputs = make_inputs(**SMALL, **{**OPTIONS, **FROZEN}[options], device=device)
    names = [name for name in TRAINED if options in OPTIONS or name not in ("lora_A", "lora_B")]
    fn, leaves = function_of(inputs, names, backend="aten" if options == "plain" else "auto")
    dx = torch.autograd.grad(fn(*leaves).square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"double backward.*backend='reference'"):
        dx.sum().backward()
    fn, leaves = function_of(inputs, names, backend="reference")
    assert torch.autograd.gradgradcheck(fn, leaves)


def test_create_graph_without_a_second_derivative(device):
    inputs = make_inputs(**SMALL, device=device)
    x = inputs["x"].requires_grad_()
    plain, graphed = (torch.autograd.grad(call(**inputs).sum(), x, create_graph=flag)[0] for flag in (False, True))
    assert torch.equal(plain, graphed)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_func_grad_and_vjp(device, backend):
    inputs = make_inputs(gate=(5,), frozen=True, dropout_p=0.2, scaling=None, device=device)
    names = [name for name in TRAINED if name in inputs]
    dy = dy_for(inputs)
    expected = evaluate(partial(call, backend=backend), inputs, dy, names)
    params = {name: inputs[name] for name in names}

    def run(params):
        return call(**{**inputs, **params}, backend=backend)

    y, vjp = torch.func.vjp(run, params)
    grads = torch.func.grad(lambda params: (run(params) * dy).sum())(params)
    assert torch.equal(y, expected["y"])
    for name in names:
        assert torch.equal(vjp(dy)[0][name], expected[name]) and torch.equal(grads[name], expected[name]), name


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "grad of grad": lambda f, x: torch.func.grad(lambda z: torch.func.grad(lambda w: f(w).square().sum())(z).sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_other_transforms_raise_and_name_the_way_out(device, transform):
    inputs = make_inputs(**{**SMALL, "lead": (3,)}, device=device)

    def fn(x, backend="auto"):
        return routed_lora_linear(**{**inputs, "x": x}, backend=backend)

    with pytest.raises(RuntimeError, match=r"routed_lora: .*backend='reference'"):
        TRANSFORMS[transform](fn, inputs["x"])
    y = fn(inputs["x"])
    result = TRANSFORMS[transform](partial(fn, backend="reference"), inputs["x"])
    if transform == "vmap":
        torch.testing.assert_close(result, y)
    if transform in ("jacrev", "jacfwd"):
        expected = torch.autograd.functional.jacobian(fn, inputs["x"])
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "gate", "scaling"])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_raises_whatever_carries_the_tangent(device, name, learns, compiled):
    """Without it the tangent would be lost where nothing learns, and in a compiled graph."""
    inputs = make_inputs(gate=(5,), routing=False, scaling=None, device=device)

    def run(t, backend="auto"):
        return call(**{**inputs, name: t}, backend=backend)

    torch._dynamo.reset()
    fn = torch.compile(run, backend="aot_eager") if compiled else run
    t = inputs[name].requires_grad_(learns)
    with forward_ad.dual_level():
        assert fn(t).shape == run(t).shape, "a level without a tangent changes nothing"
        dual = forward_ad.make_dual(t, torch.ones_like(t))
        told = r"routed_lora: forward mode .*backend='reference'" if not (compiled and learns) else "jvp|forward mode"
        with pytest.raises(RuntimeError, match=told):  # where a graph learns torch may come first
            fn(dual)
        assert forward_ad.unpack_dual(run(dual, "reference")).tangent is not None


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("draw", ["fresh", "seeded"])
def test_checkpointing_replays_the_draw(device, use_reentrant, draw):
    inputs = make_inputs(dropout_p=0.5, gate=(5,), device=device)
    if draw == "fresh":
        inputs["dropout_seed"] = None
    x = inputs["x"].requires_grad_()
    lora_A = inputs["lora_A"].requires_grad_()

    def block(x):
        return routed_lora_linear(**{**inputs, "x": routed_lora_linear(**{**inputs, "x": x})[..., :1] + x}).square()

    results = []
    for run in (block, partial(checkpoint, block, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        y = run(x)
        torch.manual_seed(6)
        results.append((y, *torch.autograd.grad(y.sum(), [x, lora_A])) if not use_reentrant else backward(y, x, lora_A))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def backward(y, *leaves):
    """Reentrant checkpointing knows ``backward`` alone, not ``autograd.grad``."""
    y.sum().backward()
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return (y, *grads)


OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "routed", "delta", "bank_frozen"])
def test_opcheck(device, name, dtype):
    options = {**OPTIONS, **FROZEN}[name]
    inputs = make_inputs(**{**SMALL, "dtype": dtype, "adapter_dtype": torch.float32}, **options, device=device)
    threshold = torch.tensor(19661, device=device) if "dropout_p" in options else None
    fields = {**inputs, "seed": inputs.get("dropout_seed"), "threshold": threshold}
    projection = Projection(**{name: fields.get(name) for name in Projection._fields})
    x, (tensors, given) = inputs["x"], pack_projections([projection])
    out = torch.ops.clora_kernels.routed_lora(x, tensors, given, "aten")
    needs = [True, True, True, "routing" in inputs, "gate" in inputs, "bias" in inputs, True]
    needs[0] = inputs["weight"] is not None
    arguments = ([dy_for(inputs)], x, [out[1]], x.dtype, True, needs, tensors, given, "aten")
    torch.library.opcheck(torch.ops.clora_kernels.routed_lora_backward.default, arguments, test_utils=OPCHECK)
    for t in (x, *tensors):
        t.requires_grad_(t.is_floating_point() and t is not inputs.get("frozen_routing"))
    arguments = (x, tensors, given, "aten")
    torch.library.opcheck(torch.ops.clora_kernels.routed_lora.default, arguments, test_utils=OPCHECK)


def test_operators_called_directly_have_the_gradients_of_the_function(device):
    inputs = make_inputs(gate=(5,), frozen=True, scaling=None, device=device)
    names = ("x", "weight", "lora_A", "lora_B", "routing", "gate", "bias", "scaling")

    def directly(**inputs):
        fields = {name: inputs.get(name) for name in Projection._fields}
        tensors, given = pack_projections([Projection(**fields)])
        return torch.ops.clora_kernels.routed_lora(inputs["x"], tensors, given, "aten")[0]

    dy = dy_for(inputs)
    expected, got = evaluate(call, inputs, dy, names), evaluate(directly, inputs, dy, names)
    assert all(torch.equal(expected[k], got[k]) for k in expected)


def test_operator_outputs_are_tensors_of_their_own_and_p_takes_no_gradient(device):
    inputs = make_inputs(device=device)
    x = inputs.pop("x").requires_grad_()
    _, projections = prepare(x, [RoutedLoRA(**inputs)] * 2, None)
    tensors, given = pack_projections(projections)
    outputs = torch.ops.clora_kernels.routed_lora(x, tensors, given, "aten")
    assert len({t.untyped_storage().data_ptr() for t in outputs}) == 4
    assert [t.requires_grad for t in outputs] == [True, True, False, False]


def bank_inputs(device):
    inputs = make_inputs(**{**SMALL, "scaling": 0.5}, bank=3, device=device)
    return inputs, {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
def test_a_bank_under_fake_tensors(device, backend):
    inputs, tensors = bank_inputs(device)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) for k, v in tensors.items()}
        y = routed_lora_linear(**{**inputs, **fake}, backend=backend)
    assert y.shape == (2, 3, 4) and y.dtype == torch.float64


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_bank_is_traced_and_its_index_still_checked(device, backend, tracing):
    inputs, tensors = bank_inputs(device)

    def run(*values):
        return routed_lora_linear(**{**inputs, **dict(zip(tensors, values, strict=True))}, backend=backend)

    graph = make_fx(run, tracing_mode=tracing)(*tensors.values())
    other = {**tensors, "routing_index": tensors["routing_index"].flip(0)}
    assert torch.equal(graph(*other.values()), run(*other.values()))
    if backend == "auto" and device.type == "cpu":
        with pytest.raises(IndexError, match=r"routing_index\[0\]: got 3, expected 0 <= index < 3"):
            graph(*{**tensors, "routing_index": tensors["routing_index"] * 0 + 3}.values())


def test_vmap_over_samples_of_a_bank(device):
    inputs, _ = bank_inputs(device)
    x, index = inputs.pop("x"), inputs.pop("routing_index")

    def of_sample(x, index):
        return routed_lora_linear(x[None], routing_index=index[None], **inputs, backend="reference")[0]

    y = routed_lora_linear(x, routing_index=index, **inputs)
    torch.testing.assert_close(torch.func.vmap(of_sample)(x, index), y)
    twice = torch.func.vmap(torch.func.vmap(of_sample))(x[None], index[None])
    torch.testing.assert_close(twice[0], y)
    if device.type == "cpu":
        with pytest.raises(IndexError, match=r"routing_index\[0, 0\]: got -1, expected 0 <= index < 3"):
            torch.func.vmap(of_sample)(x, index * 0 - 1)
