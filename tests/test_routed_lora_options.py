"""What the options mean: an independent formula, frozen routing, banks, gates, base outputs, autocast."""

from __future__ import annotations

import pytest
import torch
from strategies import DIFFERENTIABLE, DTYPES, call, dy_for

from clora_kernels import dropout_mask, routed_lora_delta, routed_lora_linear
from clora_kernels.reference import routed_lora as reference
from clora_kernels.reference.routed_lora_samples import make_inputs, sample_inputs
from clora_kernels.testing import assert_parity, evaluate, saved_tensors

SAMPLES = [name for name, _ in sample_inputs()]


def formula(
    x, weight, lora_A, lora_B, routing=None, bias=None, *, frozen_routing=None, routing_index=None, gate=None,
    scaling=1.0, dropout_p=0.0, dropout_seed=None, base_output=None,
):  # fmt: skip
    """The layer from its definition, term by term, sharing no line with the package but the mask."""
    if dropout_p:
        kept = dropout_mask(x, dropout_p, dropout_seed)
        dropped = x * kept / max(1 - round(dropout_p * 65536) / 65536, 1e-9)
    else:
        dropped = x
    p = torch.einsum("...k,rk->...r", dropped, lora_A)
    q = p if gate is None else p * gate
    if routing is not None:
        R = routing if frozen_routing is None else routing + frozen_routing
        q = torch.einsum("...r,rt->...t", q, R) if routing_index is None else per_sample(q, R, routing_index)
    y = scaling * torch.einsum("...r,nr->...n", q, lora_B)
    for term in (None if weight is None else torch.einsum("...k,nk->...n", x, weight), bias, base_output):
        y = y if term is None else y + term
    return y


def per_sample(q, R, index):
    rows = [torch.einsum("...r,rt->...t", q[s], R[int(t)]) for s, t in enumerate(index)]
    return torch.stack(rows) if rows else q @ R[0]


def in_fp64(inputs):
    """The inputs widened, floats and all, so that the formula can be differentiated at full precision."""
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", SAMPLES)
def test_reference_is_the_definition(device, name):
    """y and all gradients of the reference, forward and by hand, are those of autograd through the definition; with a
    frozen routing lora_A and lora_B get those of the layer without it."""
    inputs = in_fp64(dict(sample_inputs(device=device))[name])
    dy = dy_for(inputs)
    wanted = [k for k in DIFFERENTIABLE if isinstance(inputs.get(k), torch.Tensor)]
    results = evaluate(formula, inputs, dy, wanted)
    if inputs.get("frozen_routing") is not None:
        live = {k: v for k, v in inputs.items() if k != "frozen_routing"}
        of_live = evaluate(formula, live, dy, wanted)
        assert inputs["x"].numel() == 0 or not torch.equal(of_live["lora_A"], results["lora_A"])
        results |= {k: of_live[k] for k in ("lora_A", "lora_B")}
    assert_parity(results, inputs, dy=dy)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("bank", [0, 2])
def test_frozen_routing_carries_earlier_tasks(device, bank, backend):
    """Where the live routing is zero the frozen one still speaks in y, dx and dgate; lora_A and lora_B hear nothing."""
    inputs = make_inputs(frozen=True, bank=bank, gate=(5,), scaling=None, dtype=torch.float64, device=device)
    inputs["routing"] = torch.zeros_like(inputs["routing"])
    names = ("x", "lora_A", "lora_B", "routing", "gate", "scaling")
    results = evaluate(lambda **i: call(**i, backend=backend), inputs, dy_for(inputs), names)
    assert_parity(results, inputs, dy=dy_for(inputs), gradients=names)
    base = reference.forward(inputs["x"], inputs["weight"], inputs["lora_A"], 0 * inputs["lora_B"], bias=inputs["bias"])
    assert not torch.equal(results["y"], base)
    assert not results["lora_A"].any() and not results["lora_B"].any()
    assert all(results[name].any() for name in ("x", "routing", "gate", "scaling"))


def test_identity_routing_is_plain_lora(device):
    inputs = make_inputs(routing=False, device=device) | {"backend": "aten"}
    identity = torch.eye(5, device=device)
    for more in ({"routing": identity}, {"routing": 0 * identity, "frozen_routing": identity}):
        assert torch.equal(routed_lora_linear(**inputs, **more), routed_lora_linear(**inputs))


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_bank_is_each_sample_by_its_own_routing(device, index_dtype):
    """A mixed-task batch equals its samples one by one, forward and backward; an unused routing gets zero."""
    inputs = make_inputs((4, 7), bank=5, frozen=True, dtype=torch.float64, device=device)
    inputs["routing_index"] = torch.tensor([3, 0, 3, 1], device=device, dtype=index_dtype)
    dy = dy_for(inputs)
    batch = evaluate(routed_lora_linear, inputs, dy, ["x", "routing"])
    dR = torch.zeros_like(inputs["routing"])
    for s, t in enumerate(inputs["routing_index"].tolist()):
        single = {k: v for k, v in inputs.items() if k != "routing_index"}
        single |= {k: inputs[k][t] for k in ("routing", "frozen_routing")} | {"x": inputs["x"][s]}
        one = evaluate(routed_lora_linear, single, dy[s], ["x", "routing"])
        assert_parity({"y": batch["y"][s], "x": batch["x"][s]}, single, dy=dy[s], gradients=["x"])
        assert_parity(one, single, dy=dy[s], gradients=["x", "routing"])
        dR[t] += one["routing"]
    assert_parity({**batch, "routing": dR}, inputs, dy=dy, gradients=["x", "routing"])
    assert not batch["routing"][[2, 4]].any() and all(batch["routing"][t].any() for t in (0, 1, 3))


def test_bank_beyond_its_scratch_runs_in_blocks(device, monkeypatch):
    """A batch whose r×r matrices exceed the scratch is cut into blocks of samples, with the same result."""
    inputs = make_inputs((7, 3), bank=3, frozen=True, gate=(5,), device=device)
    monkeypatch.setattr("clora_kernels.kernels.routed_lora.banks.SCRATCH_BYTES", 2 * 4 * 5 * 5)
    assert_parity(call, inputs, dy=dy_for(inputs))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5), (7, 1), (7, 5), (3, 1, 1), (3, 1, 5), (3, 7, 1), (3, 7, 5)])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32"])
def test_gates_of_every_shape(device, shape, dtypes):
    dtype, adapter_dtype = DTYPES[dtypes]
    inputs = make_inputs(gate=shape, frozen=True, dtype=dtype, adapter_dtype=adapter_dtype, device=device)
    result = assert_parity(call, inputs, dy=dy_for(inputs))
    assert "gate" in result


@pytest.mark.parametrize("base", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32", "fp16"])
def test_base_output_of_each_dtype(device, dtypes, base):
    """y has the base output's dtype, is rounded to it once, and leaves the base output as it is."""
    (dtype, adapter_dtype), (base_dtype, _) = DTYPES[dtypes], DTYPES[base]
    options = {"weight": False, "base_output": base_dtype, "dropout_p": 0.2, "device": device}
    inputs = make_inputs((4, 9), dtype=dtype, adapter_dtype=adapter_dtype, **options)
    assert_parity(call, inputs, dy=dy_for(inputs))
    arguments = {k: v for k, v in inputs.items() if k != "weight"}
    before, y = inputs["base_output"].clone(), routed_lora_delta(**arguments)
    assert y.dtype == base_dtype and torch.equal(inputs["base_output"], before)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["everything", "bank_frozen", "delta", "dropout", "no_rows"])
@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_autocast_runs_in_its_dtype(device, half, name, backend, mask_path):
    """x and weight are cast once, the adapter stays fp32 where it is small; gradients come back in fp32."""
    inputs = dict(sample_inputs(device=device))[name]
    cast = {k: v.to(half) if k in ("x", "weight") and v is not None else v for k, v in inputs.items()}
    wanted = [k for k in DIFFERENTIABLE if isinstance(inputs.get(k), torch.Tensor)]

    def under_autocast(**arguments):
        with torch.autocast(device.type, dtype=half):
            return call(**arguments, backend=backend)

    results = evaluate(under_autocast, inputs, dy_for(cast), wanted)
    assert results["y"].dtype == half and all(results[k].dtype == torch.float32 for k in wanted)
    for k in ("x", "weight"):
        if k in results:
            narrow = results[k].to(half)
            assert torch.equal(narrow.float(), results[k])
            results[k] = narrow
    assert_parity(results, cast, dy=dy_for(cast), gradients=wanted)


def test_autocast_mixes_no_fp64(device):
    """As in F.linear: an fp64 x is not autocast, and no other weight is made to fit it."""
    inputs = make_inputs(dtype=torch.float64, routing=False, device=device)
    inputs["weight"] = inputs["weight"].bfloat16()
    with torch.autocast(device.type, dtype=torch.bfloat16), pytest.raises(TypeError, match="weight: got dtype"):
        routed_lora_linear(**inputs)


def test_autocast_leaves_fp64_and_backward_alone(device):
    inputs = make_inputs(dtype=torch.float64, device=device)
    x = inputs["x"].requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = routed_lora_linear(**inputs)
        (dx,) = torch.autograd.grad(y, x, dy_for(inputs))
    assert y.dtype == dx.dtype == torch.float64
    assert_parity({"y": y.detach(), "x": dx}, inputs, dy=dy_for(inputs), gradients=["x"])


@pytest.mark.parametrize("bank", [0, 2])
def test_backward_inside_autocast_is_that_outside(device, bank):
    """What backward sums in fp32 must not be cast down where somebody calls it under autocast."""
    inputs = make_inputs(bank=bank, frozen=True, gate=(5,), scaling=None, device=device)
    leaves = [inputs[k].requires_grad_() for k in ("x", "weight", "lora_A", "lora_B", "routing", "gate", "scaling")]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = routed_lora_linear(**inputs)
        inside = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    outside = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("dtype, base, expected", [(torch.bfloat16, 256.0, 258.0), (torch.float32, 0.0, 1 + 2**-8)])
def test_the_adapter_is_not_rounded_before_it_meets_the_base(device, dtype, base, expected):
    """1 + 2⁻⁸ is 1 in bf16: rounded first, 256 + 1 would be 256, and an fp32 base would get 1."""
    x, ones = torch.tensor([[1.0, 2.0**-8]], device=device).bfloat16(), torch.ones(1, 2, device=device)
    base_output = torch.full((1, 1), base, dtype=dtype, device=device)
    assert routed_lora_delta(x, torch.eye(2, device=device), ones, base_output=base_output).item() == expected


def test_a_base_output_is_not_kept_for_backward(device):
    """Its values enter no gradient, so changing it afterwards must not matter, and it must not occupy memory."""
    inputs = make_inputs(weight=False, base_output=torch.float32, device=device)
    base, lora_A = inputs.pop("base_output"), inputs["lora_A"].requires_grad_()
    inputs.pop("weight", None), inputs.pop("bias", None)
    with saved_tensors() as saved:
        y = routed_lora_delta(**inputs, base_output=base)
    assert not saved.holds(base)
    expected = torch.autograd.grad(y.sum(), lora_A, retain_graph=True)[0]
    base.relu_()
    assert torch.equal(torch.autograd.grad(y.sum(), lora_A)[0], expected)


def test_meta_tensors(device):
    inputs = make_inputs(frozen=True, gate=(3, 1, 5), dropout_p=0.5, device=device)
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    meta["x"].requires_grad_()
    y = routed_lora_linear(**meta)
    assert y.shape == (3, 7, 29) and y.device.type == "meta"
    y.sum().backward()
    assert meta["x"].grad.shape == meta["x"].shape
