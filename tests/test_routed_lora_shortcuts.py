"""What is kept or skipped to save time changes nothing: scalars that are made once, checks that pass at a glance."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from clora_kernels import routed_lora_linear
from clora_kernels.autograd.routed_lora import arguments
from clora_kernels.kernels.routed_lora.algebra import Projection
from clora_kernels.reference.routed_lora_samples import make_inputs
from clora_kernels.testing import assert_parity

X = torch.empty(2, 3)


@pytest.fixture(autouse=True)
def _nothing_kept():
    arguments._kept_scalar.cache_clear()


def is_plain(t, value):
    return (
        type(t) is torch.Tensor
        and t.device.type == "cpu"
        and (t.dtype, t.dim()) == (torch.float32, 0)
        and not t.is_inference()
        and not t.requires_grad
        and t.item() == torch.tensor(value, dtype=torch.float32).item()
    )


class Other(torch.overrides.TorchFunctionMode):
    """A mode that makes something else of every tensor."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out + 1 if function is torch.full else out


CONTEXTS = {
    "inference": torch.inference_mode,
    "fake": FakeTensorMode,
    "meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "another mode": Other,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_first_used_anywhere_a_scalar_is_right_afterwards(context):
    with CONTEXTS[context]():
        first = arguments.scaling_tensor(1.7, X)
        arguments.dropout_tensors(0.5, torch.tensor(3), True, X)
    assert isinstance(first, FakeTensor) == (context == "fake")
    assert is_plain(arguments.scaling_tensor(1.7, X), 1.7)
    assert arguments.dropout_tensors(0.5, torch.tensor(3), True, X)[1].item() == 32768


@pytest.mark.parametrize("context", ["inference", "meta", "no_grad", "another mode"])
def test_first_called_anywhere_a_layer_learns_afterwards(context):
    inputs = make_inputs(routing=False, scaling=1.7, dropout_p=0.25)
    with CONTEXTS[context]():
        routed_lora_linear(**inputs)
    dy = torch.randn(3, 7, 29)
    assert_parity(routed_lora_linear, inputs, dy=dy)


def test_first_used_under_transforms_a_scalar_is_right_afterwards():
    inputs = make_inputs(routing=False, scaling=1.7)
    for transform in (torch.func.grad, lambda f: lambda x: torch.func.vjp(f, x)[0]):
        transform(lambda x: routed_lora_linear(**{**inputs, "x": x}).sum())(inputs["x"])
        assert is_plain(arguments.scaling_tensor(1.7, inputs["x"]), 1.7)
    torch.func.vmap(lambda x: x * arguments.scaling_tensor(1.9, X))(torch.ones(3))
    assert is_plain(arguments.scaling_tensor(1.9, X), 1.9)
    assert_parity(routed_lora_linear, inputs, dy=torch.randn(3, 7, 29))


def test_a_scalar_is_made_once_for_a_value_and_a_dtype():
    assert arguments.scaling_tensor(1.7, X) is arguments.scaling_tensor(1.7, X)
    wide = arguments.scaling_tensor(1.7, X.double())
    assert wide.dtype == torch.float64 and wide.item() == 1.7


@pytest.mark.parametrize("order", [(1, 1.0), (1.0, 1), (32768, 32768.0), (0, -0.0), (0.0, -0.0)])
def test_equal_numbers_of_other_types_share_a_scalar_and_lose_nothing(order):
    """Equal keys mean equal values: the dtype is that of the key, whichever number came first."""
    for value in order:
        for x, dtype in ((X, torch.float32), (X.double(), torch.float64)):
            t = arguments.scaling_tensor(value, x)
            assert t.dtype == dtype and t.item() == value
        assert arguments._scalar(value, torch.int64, X.device).dtype == torch.int64


@pytest.mark.parametrize("value", [True, False, None, "1", 1j])
def test_what_is_no_number_is_refused_though_it_equals_one(value):
    arguments.scaling_tensor(1.0, X), arguments.scaling_tensor(0.0, X)
    with pytest.raises(TypeError, match="scaling: got"):
        arguments.scaling_tensor(value, X)


def test_numbers_of_all_kinds():
    import numpy as np

    for value in (np.float32(0.3), np.float64(0.3), np.int64(3), math.inf, 2**40, Fraction(1, 3)):
        assert is_plain(arguments.scaling_tensor(value, X), float(value))
    for _ in range(2):  # NaN is a key that equals no other
        assert math.isnan(arguments.scaling_tensor(float("nan"), X).item())


@pytest.mark.parametrize("value", [10**400, 1e39, -1e39])
def test_a_number_that_does_not_fit_is_refused(value):
    with pytest.raises(
        ValueError, match=rf"scaling: got {re.escape(str(value))}, expected a number that torch.float32"
    ):
        arguments.scaling_tensor(value, X)


def test_a_symbol_is_not_kept():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.empty(5, 3), static_shapes=False)
    assert isinstance(x.shape[0], torch.SymInt)
    with mode:
        arguments.scaling_tensor(x.shape[0] * 0.5, X)
    arguments.scaling_tensor(x.shape[0], X)  # outside of the mode, too, it comes through
    assert arguments._kept_scalar.cache_info().currsize == 0


CHANGES = {
    "none": lambda t: None,
    "number": lambda t: 1.0,
    "half": lambda t: t.bfloat16(),
    "double": lambda t: t.double(),
    "integer": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "elsewhere": lambda t: t.to("meta") if t.device.type == "cpu" else torch.zeros(t.shape),
    "scalar": lambda t: t.new_empty(()),
    "vector": lambda t: t.new_empty(t.shape[0]),
    "wider": lambda t: t.new_empty(*t.shape, 1),
    "longer": lambda t: t.new_empty(t.shape[0] + 1, *t.shape[1:]),
    "transposed": lambda t: t.mT if t.dim() == 2 else t,
    "sparse": lambda t: torch.sparse_coo_tensor(size=t.shape, device=t.device, check_invariants=False),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}
OPTIONS = ("routing", "frozen_routing", "routing_index", "gate", "base_output")


def passes_every_check(x, j):
    try:
        arguments.check_projection(x, j)
    except (TypeError, ValueError):
        return False
    return True


@settings(max_examples=400)
@given(
    lead=st.sampled_from([(), (4,), (0,), (2, 2)]),
    sizes=st.tuples(st.sampled_from([0, 3]), st.sampled_from([0, 2, 6]), st.sampled_from([0, 1, 2])),
    changes=st.dictionaries(
        st.sampled_from(["weight", "lora_A", "lora_B", "bias", "x"]), st.sampled_from(list(CHANGES)), max_size=2
    ),
    option=st.sampled_from([None] * 5 + [*OPTIONS]),
    device=st.sampled_from(["cpu", "meta"]),
)
def test_what_passes_at_a_glance_passes_every_check(lead, sizes, changes, option, device):
    """And of a plain layer it leaves nothing to the slow checks but what is wrong."""
    K, N, r = sizes
    shapes = {"weight": (N, K), "lora_A": (r, K), "lora_B": (N, r), "bias": (N,), "x": (*lead, K)}
    fields = {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
    for name, change in changes.items():
        if name != "x" or change in ("half", "double", "elsewhere"):  # x is checked before
            fields[name] = CHANGES[change](fields[name])
    x = fields.pop("x")
    fields |= dict.fromkeys(OPTIONS) | ({} if option is None else {option: torch.empty(r, device=device)})
    j = Projection(**fields, scaling=torch.ones(()), seed=None, threshold=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "is_plain_layer", lambda *tensors: False)
        passes = passes_every_check(x, j)
    assert passes_every_check(x, j) == passes
    if option is None and j.weight is not None:
        assert arguments.is_plain_layer(x, j.weight, j.lora_A, j.lora_B, j.bias) == passes
