"""Bad input: every argument, every way. The error names the argument, what came, what was expected; nothing moves."""

from __future__ import annotations

import pytest
import torch
from strategies import tensors_of

from clora_kernels import (
    RoutedLoRA,
    merge_routed_lora,
    routed_lora_delta,
    routed_lora_linear,
    routed_lora_linear_group,
)
from clora_kernels.reference.routed_lora_samples import make_inputs
from clora_kernels.testing import unchanged

S, L, K, N, R = 3, 7, 41, 29, 5


def good(device):
    """A call with every option. Single routing; the bank has cases of its own."""
    return make_inputs(frozen=True, gate=(S, 1, R), dropout_p=0.5, scaling=None, device=device)


def shaped(*shape, dtype=torch.float32):
    return lambda t: torch.ones(shape, dtype=dtype, device=t.device)


def typed(dtype):
    return lambda t: t.to(dtype)


def elsewhere(t):
    return t.to("meta")


def constant(value):
    return lambda t: value


CASES = [
    # argument, what is wrong with it, error, what the message tells beside the argument's name
    ("x", constant([1.0]), TypeError, "got list, expected a Tensor"),
    ("x", constant(None), TypeError, "got NoneType, expected a Tensor"),
    ("x", typed(torch.int64), TypeError, "got dtype torch.int64, expected one of torch.float32"),
    ("x", typed(torch.complex64), TypeError, "got dtype torch.complex64"),
    ("x", shaped(), ValueError, r"got a 0-dim tensor, expected \[\.\.\., in_features\]"),
    ("weight", constant(None), TypeError, "got NoneType, expected a Tensor"),
    ("weight", constant("w"), TypeError, "got str, expected a Tensor"),
    ("weight", typed(torch.int32), TypeError, "got dtype torch.int32"),
    ("weight", typed(torch.float16), TypeError, "got dtype torch.float16, expected torch.float32, the dtype of x"),
    ("weight", shaped(N), ValueError, r"got shape \(29,\), expected \(N, 41\)"),
    ("weight", shaped(N, K + 1), ValueError, r"got shape \(29, 42\), expected \(N, 41\)"),
    ("weight", shaped(N, K, 1), ValueError, r"got shape \(29, 41, 1\)"),
    ("weight", elsewhere, ValueError, "got device meta, expected .*, the device of x"),
    ("lora_A", constant(None), TypeError, "got NoneType, expected a Tensor"),
    ("lora_A", typed(torch.bool), TypeError, "got dtype torch.bool"),
    ("lora_A", shaped(R), ValueError, r"got shape \(5,\), expected \(r, 41\)"),
    ("lora_A", shaped(R, K - 1), ValueError, r"got shape \(5, 40\), expected \(r, 41\)"),
    ("lora_A", shaped(0, K), ValueError, "got rank 0, expected a rank of at least 1"),
    ("lora_A", elsewhere, ValueError, "got device meta"),
    ("lora_B", constant(1.0), TypeError, "got float, expected a Tensor"),
    ("lora_B", typed(torch.uint8), TypeError, "got dtype torch.uint8"),
    ("lora_B", shaped(N, R + 1), ValueError, r"got shape \(29, 6\), expected \(29, 5\) = \(out_features, rank\)"),
    ("lora_B", shaped(N + 1, R), ValueError, r"got shape \(30, 5\), expected \(29, 5\)"),
    ("lora_B", shaped(N), ValueError, r"got shape \(29,\), expected \(29, 5\)"),
    ("lora_B", elsewhere, ValueError, "got device meta"),
    ("routing", constant(2), TypeError, "got int, expected a Tensor"),
    ("routing", typed(torch.int64), TypeError, "got dtype torch.int64"),
    ("routing", shaped(R, R + 1), ValueError, r"got shape \(5, 6\), expected \(5, 5\) or a bank"),
    ("routing", shaped(R), ValueError, r"got shape \(5,\), expected \(5, 5\) or a bank"),
    ("routing", shaped(0, R, R), ValueError, r"got shape \(0, 5, 5\)"),
    ("routing", shaped(2, 2, R, R), ValueError, r"got shape \(2, 2, 5, 5\)"),
    ("routing", elsewhere, ValueError, "got device meta"),
    ("bias", constant(0), TypeError, "got int, expected a Tensor"),
    ("bias", typed(torch.int32), TypeError, "got dtype torch.int32"),
    ("bias", shaped(N + 1), ValueError, r"got shape \(30,\), expected \(29,\) = \(out_features,\)"),
    ("bias", shaped(1), ValueError, r"got shape \(1,\), expected \(29,\)"),
    ("bias", shaped(), ValueError, r"got shape \(\), expected \(29,\)"),
    ("bias", elsewhere, ValueError, "got device meta"),
    ("frozen_routing", constant([]), TypeError, "got list, expected a Tensor"),
    ("frozen_routing", typed(torch.int64), TypeError, "got dtype torch.int64"),
    ("frozen_routing", shaped(1, R, R), ValueError, r"got shape \(1, 5, 5\), expected \(5, 5\) = the shape of routing"),
    ("frozen_routing", elsewhere, ValueError, "got device meta"),
    ("frozen_routing", lambda t: t.clone().requires_grad_(), ValueError, "got requires_grad=True, expected a constant"),
    ("routing_index", shaped(S, dtype=torch.int64), ValueError, r"got one with routing of shape \(5, 5\)"),
    ("gate", constant(1.0), TypeError, "got float, expected a Tensor"),
    ("gate", typed(torch.bool), TypeError, "got dtype torch.bool"),
    ("gate", shaped(S, R), ValueError, r"got shape \(3, 5\), expected one that broadcasts to \(3, 7, 5\)"),
    ("gate", shaped(R + 1), ValueError, r"got shape \(6,\)"),
    ("gate", shaped(1, S, L, R), ValueError, r"got shape \(1, 3, 7, 5\)"),
    ("gate", elsewhere, ValueError, "got device meta"),
    ("scaling", constant("2"), TypeError, "got str, expected a number or a 0-dim float tensor"),
    ("scaling", constant(None), TypeError, "got NoneType"),
    ("scaling", constant(True), TypeError, "got bool"),
    ("scaling", constant(1j), TypeError, "got complex"),
    ("scaling", shaped(1), ValueError, r"got torch.float32 of shape \(1,\), expected a number or a 0-dim float tensor"),
    ("scaling", typed(torch.int64), ValueError, r"got torch.int64 of shape \(\)"),
    ("scaling", elsewhere, ValueError, "got device meta"),
    ("dropout_p", constant(-0.1), ValueError, "got -0.1, expected a number from 0 to 1"),
    ("dropout_p", constant(1.01), ValueError, "got 1.01, expected a number from 0 to 1"),
    ("dropout_p", constant(float("nan")), ValueError, "got nan"),
    ("dropout_p", constant("0.1"), TypeError, "got str, expected a number from 0 to 1"),
    ("dropout_p", constant(True), TypeError, "got bool"),
    ("dropout_p", constant(None), TypeError, "got NoneType"),
    ("dropout_seed", constant(7), TypeError, "got int, expected a Tensor"),
    ("dropout_seed", shaped(dtype=torch.int32), ValueError, "got torch.int32 of shape"),
    ("dropout_seed", shaped(1, dtype=torch.int64), ValueError, r"got torch.int64 of shape \(1,\), expected a 0-dim"),
    ("dropout_seed", lambda t: torch.ones((), dtype=torch.int64, device="meta"), ValueError, "got device meta"),
    ("backend", constant("cuda"), ValueError, "got 'cuda', expected one of 'auto', 'reference'"),
    ("backend", constant("native"), ValueError, "='native' cannot run routed_lora: "),
]


@pytest.mark.filterwarnings("ignore:Sparse")  # torch calls CSR a beta
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_layouts_that_are_not_strided_are_named(device, layout):
    """Each tensor alone; the weight, lora_A, lora_B and bias also of a plain layer, which is checked another way."""
    whole, bank = good(device), make_inputs(bank=2, device=device)
    plain = {k: whole[k] for k in ("x", "weight", "lora_A", "lora_B", "bias")}
    delta = make_inputs(weight=False, base_output=torch.float32, device=device)
    calls = [(routed_lora_linear, inputs) for inputs in (whole, plain, bank)] + [(routed_lora_delta, delta)]
    tried = 0
    for fn, inputs in calls:
        inputs = {k: v for k, v in inputs.items() if fn is routed_lora_linear or k not in ("weight", "bias")}
        for name, t in inputs.items():
            if isinstance(t, torch.Tensor) and (layout is torch.sparse_coo or t.dim() >= 2):
                wrong = {**inputs, name: t.detach().to_sparse(layout=layout)}
                with pytest.raises(TypeError, match=f"^{name}: got layout {layout}, expected torch.strided$"):
                    fn(**wrong)
                tried += 1
    assert tried >= (25 if layout is torch.sparse_coo else 15)
    with pytest.raises(TypeError, match=f"^weight: got layout {layout}, expected torch.strided$"):
        merge_routed_lora(plain["weight"].to_sparse(layout=layout), plain["lora_A"], plain["lora_B"])


def raises_and_changes_nothing(fn, inputs, error, message):
    state = torch.get_rng_state()
    present = [t for t in tensors_of(inputs) if t.device.type != "meta"]
    with unchanged(*present), pytest.raises(error, match=message) as caught:
        fn(inputs)
    assert type(caught.value) is error
    assert torch.equal(torch.get_rng_state(), state), "no seed may be drawn for a call that fails"


def names_of_cases():
    seen = {}
    for name, *_ in CASES:
        seen[name] = seen.get(name, 0) + 1
        yield f"{name}-{seen[name]}"


@pytest.mark.parametrize("name, wrong, error, told", CASES, ids=names_of_cases())
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_layer(device, name, wrong, error, told, backend):
    inputs = {"backend": backend, **good(device), "dropout_seed": None}
    inputs[name] = wrong(inputs["x"] if inputs.get(name) is None else inputs[name])
    raises_and_changes_nothing(lambda i: routed_lora_linear(**i), inputs, error, f"{name}.*{told}")


@pytest.mark.parametrize("name, wrong, error, told", CASES, ids=names_of_cases())
def test_layer_of_a_group(device, name, wrong, error, told):
    """The second of two layers is named by its place; the first, which draws a seed, does not get to draw it."""
    x, fields = good(device)["x"], {**good(device), "backend": "auto"}
    fields[name] = wrong(fields.get(name, x))
    x, backend = fields.pop("x"), fields.pop("backend")
    first = RoutedLoRA(**{**fields_without_x(good(device)), "dropout_seed": None})
    place = "" if name in ("x", "backend") else r"adapters\[1\]\."
    raises_and_changes_nothing(
        lambda i: routed_lora_linear_group(x, [first, RoutedLoRA(**i)], backend=backend),
        fields, error, f"{place}{name}.*{told}",
    )  # fmt: skip


def fields_without_x(inputs):
    return {k: v for k, v in inputs.items() if k != "x"}


def test_group_itself(device):
    x = good(device)["x"]
    with pytest.raises(ValueError, match="adapters: got none, expected at least one RoutedLoRA"):
        routed_lora_linear_group(x, [])
    with pytest.raises(TypeError, match=r"adapters\[0\]: got dict, expected a RoutedLoRA"):
        routed_lora_linear_group(x, [fields_without_x(good(device))])


@pytest.mark.parametrize(
    "base, error, told",
    [
        (lambda t: 3, TypeError, "got int, expected a Tensor"),
        (typed(torch.int64), TypeError, "got dtype torch.int64"),
        (shaped(S, L, N + 1), ValueError, r"got shape \(3, 7, 30\), expected \(3, 7, 29\)"),
        (shaped(S * L, N), ValueError, r"got shape \(21, 29\), expected \(3, 7, 29\)"),
        (elsewhere, ValueError, "got device meta"),
    ],
)
def test_base_output(device, base, error, told):
    inputs = make_inputs(weight=False, base_output=torch.float32, device=device)
    inputs.pop("weight")
    inputs["base_output"] = base(inputs["base_output"])
    raises_and_changes_nothing(lambda i: routed_lora_delta(**i), inputs, error, f"base_output.*{told}")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"routing_index": None}, ValueError, r"routing_index.*got none with routing of shape \(4, 5, 5\)"),
        ({"routing_index": [0, 1, 2]}, TypeError, "routing_index.*got list, expected a Tensor"),
        ({"routing_index": torch.tensor([0.0, 1, 2])}, TypeError, "routing_index.*got dtype torch.float32, expected"),
        ({"routing_index": torch.tensor([0, 1])}, ValueError, r"routing_index.*got shape \(2,\), expected \(3,\)"),
        ({"routing_index": torch.tensor([[0, 1, 2]])}, ValueError, r"routing_index.*got shape \(1, 3\)"),
        ({"routing_index": torch.tensor([0, 1, 2], device="meta")}, ValueError, "routing_index.*got device meta"),
        ({"x": torch.ones(K)}, ValueError, r"routing_index.*got x of shape \(41,\)"),
        ({"routing": None}, ValueError, "routing_index.*got a tensor without routing, expected routing beside it"),
    ],
)
def test_bank(device, change, error, message):
    inputs = {**make_inputs(bank=4, device=device), **change}
    for name, value in change.items():
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            inputs[name] = value.to(device)
    raises_and_changes_nothing(lambda i: routed_lora_linear(**i), inputs, error, message)


def test_frozen_routing_needs_routing(device):
    inputs = {**good(device), "routing": None}
    raises_and_changes_nothing(lambda i: routed_lora_linear(**i), inputs, ValueError, "frozen_routing.*without routing")


@pytest.mark.parametrize("index", [4, -1])
@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_index_outside_the_bank(device, monkeypatch, index, backend):
    monkeypatch.setenv("CLORA_CHECK_INDICES", "1")
    inputs = make_inputs(bank=4, device=device)
    inputs["routing_index"] = torch.tensor([0, index, 7], device=device)
    with pytest.raises(IndexError, match=rf"^routing_index\[1\]: got {index}, expected 0 <= index < 4"):
        routed_lora_linear(**inputs, backend=backend)
    x, wrong = inputs.pop("x"), RoutedLoRA(**inputs)
    right = wrong._replace(routing_index=torch.tensor([0, 3, 3], device=device))
    with pytest.raises(IndexError, match=rf"^adapters\[1\]\.routing_index\[1\]: got {index}, expected"):
        routed_lora_linear_group(x, [right, wrong], backend=backend)


@pytest.mark.gpu
def test_index_outside_the_bank_reads_nothing_outside_it():
    inputs = make_inputs(bank=4, device="cuda")
    clamped = {**inputs, "routing_index": torch.tensor([0, 3, 0], device="cuda")}
    inputs["routing_index"] = torch.tensor([0, 10**9, -(10**9)], device="cuda")
    assert torch.equal(routed_lora_linear(**inputs), routed_lora_linear(**clamped))


MERGE = [
    ("weight", constant(None), TypeError, "got NoneType, expected a Tensor"),
    ("weight", typed(torch.int8), TypeError, "got dtype torch.int8"),
    ("weight", shaped(N), ValueError, r"got shape \(29,\), expected \(N, K\)"),
    ("lora_A", shaped(R, K + 1), ValueError, r"got shape \(5, 42\), expected \(r, 41\)"),
    ("lora_A", elsewhere, ValueError, "got device meta"),
    ("lora_B", shaped(N + 1, R), ValueError, r"got shape \(30, 5\), expected \(29, 5\)"),
    ("routing", shaped(2, R, R), ValueError, r"got a bank of shape \(2, 5, 5\), expected one"),
    ("routing", shaped(R + 1, R), ValueError, r"got shape \(6, 5\)"),
    ("frozen_routing", shaped(R), ValueError, r"got shape \(5,\), expected \(5, 5\)"),
    ("gate", shaped(S, 1, R), ValueError, r"got shape \(3, 1, 5\)"),
    ("gate", shaped(1, R), ValueError, r"got shape \(1, 5\), expected \(5,\)"),
    ("gate", constant(1.0), TypeError, "got float"),
    ("scaling", constant("1"), TypeError, "got str, expected a number"),
    ("scaling", shaped(2), ValueError, r"got torch.float32 of shape \(2,\)"),
]


@pytest.mark.parametrize("name, wrong, error, told", MERGE)
def test_merge(device, name, wrong, error, told):
    inputs = make_inputs(frozen=True, gate=(R,), scaling=None, device=device)
    inputs = {k: v for k, v in inputs.items() if k not in ("x", "bias")}
    inputs[name] = wrong(inputs[name])
    raises_and_changes_nothing(lambda i: merge_routed_lora(**i), inputs, error, f"{name}.*{told}")
