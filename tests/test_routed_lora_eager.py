"""Plain calls go past the dispatcher and compute the same bits; what wants to see the operators sees them."""

from __future__ import annotations

import pytest
import torch
from strategies import call, dy_for
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from clora_kernels import RoutedLoRA, routed_lora_linear, routed_lora_linear_group
from clora_kernels.autograd.routed_lora import calls, function
from clora_kernels.reference.routed_lora_samples import make_inputs
from clora_kernels.testing import dispatched, evaluate, saved_tensors

NAMES = ("x", "weight", "lora_A", "lora_B", "routing", "bias", "gate", "scaling", "base_output")
OPTIONS = {
    "plain": {},
    "gated": {"gate": (3, 1, 5), "frozen": True, "dropout_p": 0.2},
    "bank": {"bank": 2, "gate": (5,), "frozen": True},
    "delta": {"weight": False, "base_output": torch.float32},
}


@pytest.fixture(params=["plain", "dispatched"])
def path(request, monkeypatch):
    """Runs a test on the way of plain calls and on that of all others."""
    if request.param == "dispatched":
        monkeypatch.setattr(calls, "is_plain", lambda x, tensors: False)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_both_ways_give_the_same_bits(device, monkeypatch, options, dtype):
    inputs = make_inputs(**OPTIONS[options], dtype=dtype, adapter_dtype=torch.float32, scaling=None, device=device)
    names = [name for name in NAMES if isinstance(inputs.get(name), torch.Tensor)]
    for subset in [names, *([name] for name in names)]:
        plain = evaluate(call, inputs, dy_for(inputs), subset)
        with monkeypatch.context() as patched:
            patched.setattr(calls, "is_plain", lambda x, tensors: False)
            other = evaluate(call, inputs, dy_for(inputs), subset)
        assert plain.keys() == other.keys() and all(torch.equal(plain[k], other[k]) for k in plain), subset


@pytest.mark.parametrize("options", OPTIONS)
def test_where_nothing_learns_no_function_is_made(device, monkeypatch, options):
    """The same bits without one, in every mode in which autograd does not look; a single tensor that learns has one."""
    inputs = make_inputs(**OPTIONS[options], scaling=None, device=device)
    expected, made, right = call(**inputs), [], calls.RoutedLoRAEagerFunction.apply
    monkeypatch.setattr(calls.RoutedLoRAEagerFunction, "apply", lambda *args: made.append(1) or right(*args))
    found = [call(**inputs)]
    for name in [name for name in NAMES if isinstance(inputs.get(name), torch.Tensor)]:
        learning = {**inputs, name: inputs[name].detach().clone().requires_grad_()}
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                found.append(call(**learning))
        assert not made
        y = call(**learning)
        assert made.pop() and not made and y.requires_grad and torch.equal(y, expected), name
    assert all(torch.equal(y, expected) and not y.requires_grad for y in found)


@pytest.mark.parametrize("lead", [(), (7,), (3, 5), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize("options", OPTIONS)
def test_y_can_be_changed_in_place(device, path, options, backend, lead):
    """As y of nn.Linear: nn.ReLU(inplace=True), or h += residual, after it."""
    options = {"dropout_p": 0.2, **OPTIONS[options]}
    if "gate" in options:
        options["gate"] = (5,)
    if "bank" in options and not lead[1:]:
        lead = (3, *lead)  # of samples
    inputs = make_inputs(lead, **options, device=device)
    learned = [inputs[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
    changed, other = call(**inputs, backend=backend), call(**inputs, backend=backend)
    changed.mul_(2.0).tanh_()
    grads = (torch.autograd.grad(y, learned, torch.ones_like(y)) for y in (changed, (other * 2.0).tanh()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_y_of_a_group_can_be_changed_in_place(device, path):
    layers = [make_inputs((3, 5), N=N, device=device) for N in (29, 17)]
    x = layers[0].pop("x").requires_grad_()
    adapters = [RoutedLoRA(**{k: v for k, v in layer.items() if k != "x"}) for layer in layers]
    changed, other = routed_lora_linear_group(x, adapters), routed_lora_linear_group(x, adapters)
    for y in changed:
        y.relu_()
    grads = (torch.autograd.grad([y.sum() for y in ys], x) for ys in (changed, [y.relu() for y in other]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_either_way_saves_and_computes_what_is_wanted(device, path, options):
    """Of M, K, N and r, one name at a time: x for lora_A and the weight, what was kept for what reads it."""
    inputs = make_inputs((50,), 31, 43, 2, **{**OPTIONS[options], "gate": (2,)}, scaling=None, device=device)
    wanted = {
        "x": ["pack", "shrink", "linear"],
        "weight": [],
        "lora_A": ["pack", "shrink", "reduce"],
        "lora_B": ["reduce"] if "bank" in options else ["reduce", "unpack"],
        "bias": [],
    }
    for name in [name for name in wanted if inputs.get(name) is not None]:
        leaf = inputs[name].clone().requires_grad_()
        with saved_tensors() as saved:
            y = call(**{**inputs, name: leaf})
        with dispatched() as calls:
            y.backward(dy_for(inputs))
        assert calls == [f"routed_lora.aten.{primitive}" for primitive in wanted[name]], name
        assert saved.holds(inputs["x"]) == (name in ("weight", "lora_A"))
        shapes = [tuple(t.shape) for t in saved.tensors]
        assert shapes.count((50, 2)) == (name == "lora_B") and (50, 43) not in shapes


@pytest.mark.parametrize("trained", ["lora_B", "base_output"])
def test_a_plain_step_never_meets_the_dispatcher(device, monkeypatch, trained):
    def met(*args):
        raise AssertionError("an operator was called")

    monkeypatch.setattr(function, "below_autograd", met)
    inputs = make_inputs(**OPTIONS["delta"], device=device)
    inputs[trained].requires_grad_()
    call(**inputs).backward(dy_for(inputs))
    assert inputs[trained].grad is not None


def test_layers_of_a_group_keep_their_own(device, path):
    """Two layers of one rank, of which one learns lora_B: it reads what it kept, not what the other did."""
    layers = [make_inputs(seed=seed, device=device) for seed in (0, 1)]
    x = layers[0]["x"]
    adapters = [RoutedLoRA(**{k: v for k, v in inputs.items() if k != "x"}) for inputs in layers]
    for i in (0, 1):
        leaf = adapters[i].lora_B.detach().clone().requires_grad_()
        alone = leaf.detach().clone().requires_grad_()
        group = list(adapters)
        group[i] = group[i]._replace(lora_B=leaf)
        routed_lora_linear_group(x, group)[i].square().sum().backward()
        routed_lora_linear(**{**layers[i], "x": x, "lora_B": alone}).square().sum().backward()
        assert torch.equal(leaf.grad, alone.grad)


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapper(torch.Tensor):
    """Sees every operator that is called on it."""

    seen: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, t):
        self = torch.Tensor._make_wrapper_subclass(cls, t.shape, t.stride(), dtype=t.dtype, device=t.device)
        self.plain = t
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        args, kwargs = tree_map_only(cls, lambda t: t.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


OPERATOR = "clora_kernels.routed_lora.default"


def test_a_dispatch_mode_sees_the_operator(device):
    inputs = make_inputs(device=device)
    with Watching() as mode:
        routed_lora_linear(**inputs)
    assert OPERATOR in mode.seen


@pytest.mark.parametrize("name", ["x", "lora_A", "gate"])
def test_a_tensor_subclass_sees_the_operator(device, name):
    inputs = make_inputs(gate=(5,), device=device)
    Wrapper.seen = []
    inputs[name] = Wrapper(inputs[name])
    routed_lora_linear(**inputs)
    assert OPERATOR in Wrapper.seen


def test_parameters_are_plain(device):
    inputs = make_inputs(device=device)
    tensors = [torch.nn.Parameter(inputs[name]) for name in ("weight", "lora_A", "lora_B")]
    assert function.is_plain(inputs["x"], tensors)


@pytest.mark.filterwarnings("ignore")  # of the tracer, about every check
def test_a_tracer_meets_the_operator(device):
    """TorchScript has no lists of bools and says so; a Python function in its graph could be neither saved nor run
    elsewhere."""
    inputs = make_inputs(device=device)
    with pytest.raises(RuntimeError, match="Tracing a list of bool"):
        torch.jit.trace(lambda x: routed_lora_linear(**{**inputs, "x": x}), inputs["x"], check_trace=False)


def test_a_transform_sees_the_operator(device):
    """What torch.func cannot go through raises; on the way of plain calls it would be an error of torch's own."""
    inputs = make_inputs(device=device)
    grad = torch.func.grad(lambda x: routed_lora_linear(**{**inputs, "x": x}).sum())(inputs["x"])
    expected = evaluate(call, inputs, torch.ones_like(dy_for(inputs)), ["x"])
    assert torch.equal(grad, expected["x"])


def test_checkpointing_goes_either_way(device, path):
    inputs = make_inputs(device=device, dropout_p=0.2)
    x = inputs["x"].requires_grad_()

    def run(x):
        return routed_lora_linear(**{**inputs, "x": x}).square().sum()

    expected = torch.autograd.grad(run(x), x)[0]
    assert torch.equal(torch.autograd.grad(checkpoint(run, x, use_reentrant=False), x)[0], expected)
