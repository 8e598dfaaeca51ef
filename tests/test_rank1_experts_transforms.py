"""Rank-1 experts under autograd's and torch.func's transforms, torch.compile, gradcheck, opcheck, autocast."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from experts import DIFFERENTIABLE, SAMPLES, check, dy_for, paths, run, sample
from strategies import DTYPES
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from clora_kernels import rank1_experts
from clora_kernels.reference.rank1_experts_samples import make_inputs
from clora_kernels.testing import evaluate

SMALL = {"lead": (2, 3), "K": 5, "N": 4, "E": 6, "k": 3, "scaling": None, "dtype": torch.float64}
OPTIONS = {
    "per_token": {},
    "per_sample": {"per_sample": True, "base_output": torch.float64},
    "no_gates": {"gates": False},
}
OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def function_of(inputs, fn=rank1_experts):
    """The call as a function of its floating-point tensors alone, and those tensors."""
    names = [name for name in DIFFERENTIABLE if isinstance(inputs.get(name), torch.Tensor)]
    leaves = [inputs[name].detach().clone().requires_grad_() for name in names]
    return (lambda *args: fn(**{**inputs, **dict(zip(names, args, strict=True))})), leaves


@pytest.mark.parametrize("path", [*paths("fp64"), "reference"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(device, monkeypatch, options, path):
    fn = partial(rank1_experts, backend="reference") if path == "reference" else run(path, monkeypatch)
    inputs = make_inputs(**SMALL, **OPTIONS[options], device=device)
    assert torch.autograd.gradcheck(*function_of(inputs, fn))


@pytest.mark.parametrize("options", OPTIONS)
def test_double_backward(device, options):
    """It raises and names the way out, which works."""
    inputs = make_inputs(**SMALL, **OPTIONS[options], device=device)
    fn, leaves = function_of(inputs)
    dx = torch.autograd.grad(fn(*leaves).square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"double backward.*backend='reference'"):
        dx.sum().backward()
    assert torch.autograd.gradgradcheck(*function_of(inputs, partial(rank1_experts, backend="reference")))


def test_create_graph_without_a_second_derivative(device):
    inputs = make_inputs(**SMALL, device=device)
    x = inputs["x"].requires_grad_()
    plain, graphed = (
        torch.autograd.grad(rank1_experts(**inputs).sum(), x, create_graph=flag)[0] for flag in (False, True)
    )
    assert torch.equal(plain, graphed)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("options", OPTIONS)
def test_func_grad_and_vjp(device, backend, options):
    inputs = make_inputs(**{**SMALL, **OPTIONS[options], "dtype": torch.float32, "base_output": None}, device=device)
    names = [name for name in DIFFERENTIABLE if name in inputs]
    dy = dy_for(inputs)
    expected = evaluate(partial(rank1_experts, backend=backend), inputs, dy, names)

    def f(params):
        return rank1_experts(**{**inputs, **params}, backend=backend)

    params = {name: inputs[name] for name in names}
    y, vjp = torch.func.vjp(f, params)
    grads = torch.func.grad(lambda params: (f(params) * dy).sum())(params)
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
    one = {**inputs, "indices": inputs["indices"][0], "gates": inputs["gates"][0]}
    over_rows = transform == "vmap"

    def fn(x, backend="auto"):
        return rank1_experts(**{**(one if over_rows else inputs), "x": x}, backend=backend)

    with pytest.raises(RuntimeError, match=r"rank1_experts: .*backend='reference'"):
        TRANSFORMS[transform](fn, inputs["x"])
    result = TRANSFORMS[transform](partial(fn, backend="reference"), inputs["x"])
    if transform == "vmap":
        torch.testing.assert_close(result, torch.stack([fn(x) for x in inputs["x"]]))
    if transform in ("jacrev", "jacfwd"):
        torch.testing.assert_close(result, torch.autograd.functional.jacobian(fn, inputs["x"]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(device, use_reentrant):
    inputs = make_inputs(K=29, N=29, device=device)
    x = inputs["x"].requires_grad_()

    def block(x):
        return rank1_experts(**{**inputs, "x": rank1_experts(**{**inputs, "x": x})}).square()

    results = []
    for fn in (block, partial(checkpoint, block, use_reentrant=use_reentrant)):
        x.grad = None
        fn(x).sum().backward()
        results.append(x.grad)
    assert torch.equal(*results)


CASES = [(name, "fp32") for name in SAMPLES] + [(name, "bf16+fp32") for name in SAMPLES[:6]]


@pytest.mark.parametrize(("name", "dtypes"), CASES)
def test_fullgraph_of_every_sample(device, name, dtypes):
    inputs = sample(name, dtypes, device)
    compiled = torch.compile(rank1_experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), rank1_experts(**inputs))
    check(compiled, inputs)


def test_inductor(device):
    inputs = make_inputs(scaling=None, device=device)
    leaves = [inputs[name].requires_grad_() for name in ("x", "experts_A", "gates")]

    def loss(inputs):
        return torch.nn.functional.silu(rank1_experts(**inputs) + 1).sum()

    value, expected = torch.compile(loss, fullgraph=True)(inputs), loss(inputs)
    torch.testing.assert_close(value, expected)
    for got, want in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("scaling", ["number", "tensor"])
def test_few_graphs_for_every_number_of_rows(device, scaling):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rank1_experts, fullgraph=True, backend=counter)
    for step, M in enumerate((2, 3, 8, 64, 65, 1000)):
        inputs = make_inputs((M,), device=device, seed=step)
        inputs["scaling"] = torch.tensor(1.0 + step, device=device) if scaling == "tensor" else 1.0 + 0.3 * step
        inputs["x"].requires_grad_()
        compiled(**inputs).sum().backward()
    assert counter.frame_count <= (2 if scaling == "tensor" else 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU indices are checked in checked mode alone")
def test_a_compiled_call_still_checks_indices(device):
    inputs = make_inputs(device=device)
    compiled = torch.compile(rank1_experts, fullgraph=True, backend="aot_eager")
    compiled(**inputs)
    inputs["indices"][1, 2, 3] = 99
    with pytest.raises(IndexError, match=r"indices\[1, 2, 3\]: got 99, expected 0 <= index < 17"):
        compiled(**inputs)


def test_fake_tensors_and_traces(device):
    inputs = make_inputs(device=device)
    tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    with FakeTensorMode() as mode:
        y = rank1_experts(**{**inputs, **{k: mode.from_tensor(v) for k, v in tensors.items()}})
    assert y.shape == (3, 7, 29) and y.dtype == torch.float32
    outside = rank1_experts(**{k: mode.from_tensor(v) for k, v in make_inputs(scaling=None, device=device).items()})
    assert outside.shape == y.shape and type(outside) is type(y)

    def fn(*values):
        return rank1_experts(**{**inputs, **dict(zip(tensors, values, strict=True))})

    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(fn, tracing_mode=mode)(*tensors.values())
        other = {**tensors, "indices": tensors["indices"].flip(0)}
        assert torch.equal(graph(*other.values()), fn(*other.values()))


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16+fp32"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_opcheck(device, options, dtypes, backend):
    dtype, experts_dtype = DTYPES[dtypes]
    options = {**OPTIONS[options], "base_output": dtype, "experts_dtype": experts_dtype}
    inputs = make_inputs(**{**SMALL, "dtype": dtype}, **options, device=device)
    names = ("x", "experts_A", "experts_B", "indices", "gates", "scaling")
    operators = torch.ops.clora_kernels
    arguments = [inputs.get(name) for name in names]
    forward = (*arguments, inputs["base_output"], backend)
    _, p = operators.rank1_experts(*forward)
    needs = [True, True, True, "gates" in inputs, True]
    backward = (dy_for(inputs), *arguments, p, dtype, needs, backend)
    torch.library.opcheck(operators.rank1_experts_backward.default, backward, test_utils=OPCHECK)
    gather = (inputs["experts_B"], inputs["indices"], inputs.get("gates"))
    d = operators.rank1_experts_gather(*gather)
    needs = [True, "gates" in inputs]
    torch.library.opcheck(operators.rank1_experts_gather_backward.default, (d, *gather, needs), test_utils=OPCHECK)
    for t in forward:
        if isinstance(t, torch.Tensor):
            t.requires_grad_(t.is_floating_point())
    torch.library.opcheck(operators.rank1_experts.default, forward, test_utils=OPCHECK)
    torch.library.opcheck(operators.rank1_experts_gather.default, gather, test_utils=OPCHECK)


def test_operators_called_directly_have_the_gradients_of_the_function(device):
    inputs = make_inputs(scaling=None, base_output=torch.float32, device=device)

    def directly(x, experts_A, experts_B, indices, gates, scaling, base_output):
        arguments = (x, experts_A, experts_B, indices, gates, scaling, base_output, "auto")
        return torch.ops.clora_kernels.rank1_experts(*arguments)[0]

    dy = dy_for(inputs)
    expected, got = (evaluate(fn, inputs, dy, DIFFERENTIABLE) for fn in (rank1_experts, directly))
    assert all(torch.equal(expected[k], got[k]) for k in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_converts_x_and_not_the_pool(device, dtype):
    inputs = make_inputs(scaling=None, device=device)
    x = inputs["x"].requires_grad_()
    with torch.autocast(device.type, dtype=dtype):
        y = rank1_experts(**inputs)
        assert y.dtype == dtype
        expected = {**inputs, "x": x.detach().to(dtype)}
    check({"y": y}, expected, gradients=[])
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert dx.dtype == torch.float32 and dx.abs().max() > 0
    compiled = torch.compile(rank1_experts, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, dtype=dtype):
        assert torch.equal(compiled(**inputs), y)
        assert rank1_experts(**make_inputs(dtype=torch.float64, device=device)).dtype == torch.float64
