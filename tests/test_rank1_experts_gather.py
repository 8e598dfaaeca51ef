"""Chosen experts as tensors, and merged into a weight; pools of more elements than 32 bits count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from experts import paths
from strategies import DTYPES, LAYOUTS, laid_out, tensors_of
from torch import Tensor

from clora_kernels import gather_rank1_experts, merge_rank1_experts, rank1_experts
from clora_kernels.reference.rank1_experts_samples import make_inputs
from clora_kernels.reference.routed_lora import accumulation_dtype
from clora_kernels.testing import assert_parity, compare, evaluate, unchanged


class Gradients(NamedTuple):
    experts: Tensor
    gates: Tensor | None


def rows(experts, indices, gates=None):
    """The chosen rows times their gates in the dtype of sums, rounded once."""
    acc = accumulation_dtype(experts.dtype)
    chosen = experts[indices.long()].to(acc)
    return (chosen if gates is None else chosen * gates.to(acc)[..., None]).to(experts.dtype)


def gradients_of_rows(dy, experts, indices, gates=None):
    acc = accumulation_dtype(experts.dtype)
    dy, chosen = dy.to(acc), experts[indices.long()].to(acc)
    weighted = dy if gates is None else dy * gates.to(acc)[..., None]
    total = torch.zeros(experts.shape, dtype=acc, device=experts.device)
    total.index_add_(0, indices.long().flatten(), weighted.reshape(-1, experts.shape[1]))
    return Gradients(total.to(experts.dtype), None if gates is None else (dy * chosen).sum(-1).to(gates.dtype))


ROWS = SimpleNamespace(forward=rows, backward=gradients_of_rows)
CHOICES = {
    "per_sample": {"per_sample": True},
    "per_token": {},
    "one": {"lead": ()},
    "int32": {"index_dtype": torch.int32, "E": 300},
    "duplicates": {"E": 2, "k": 9},
    "none": {"lead": (0, 2)},
}


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("choice", CHOICES)
def test_gather(device, choice, dtypes, gates):
    _, dtype = DTYPES[dtypes]
    inputs = make_inputs(**CHOICES[choice], dtype=dtype, device=device)
    pool = (inputs["experts_A"], inputs["experts_B"])
    indices, weights = inputs["indices"], inputs["gates"].float() if gates else None
    with unchanged(*tensors_of(inputs)):
        A, B = gather_rank1_experts(*pool, indices, weights)
    assert torch.equal(A, pool[0][indices.long()]) and A.is_contiguous() and B.is_contiguous()
    assert (A.shape, B.shape) == ((*indices.shape, 41), (*indices.shape, 29))
    dy = torch.randn(*indices.shape, 29, dtype=torch.float64).to(dtype).to(device)
    call = {"experts": pool[1], "indices": indices} | ({"gates": weights} if gates else {})

    def of_B(experts, indices, gates=None):
        return gather_rank1_experts(pool[0], experts, indices, gates).B

    assert_parity(of_B, call, dy=dy, reference=ROWS)

    def of_A(experts, indices):
        return gather_rank1_experts(experts, pool[1], indices, weights).A

    dy = torch.randn(*indices.shape, 41, dtype=torch.float64).to(dtype).to(device)
    assert_parity(of_A, {"experts": pool[0], "indices": indices}, dy=dy, reference=ROWS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_in_each_layout(device, layout):
    inputs = {
        k: laid_out(v, layout) if k != "indices" else v for k, v in make_inputs(scaling=None, device=device).items()
    }
    dy = laid_out(torch.randn(3, 7, 5, 29, device=device), layout)
    call = {"experts": inputs["experts_B"], "indices": inputs["indices"], "gates": inputs["gates"]}
    assert_parity(
        lambda experts, indices, gates: gather_rank1_experts(inputs["experts_A"], experts, indices, gates).B,
        call,
        dy=dy,
        reference=ROWS,
    )


def test_gathered_rows_are_small_dense_loras(device):
    inputs = make_inputs(per_sample=True, scaling=1.0, dtype=torch.float64, device=device)
    A, B = gather_rank1_experts(*(inputs[k] for k in ("experts_A", "experts_B", "indices", "gates")))
    torch.testing.assert_close((inputs["x"] @ A.mT) @ B, rank1_experts(**inputs))


def test_gather_is_differentiable_once(device):
    inputs = make_inputs((2,), 4, 3, 6, 2, dtype=torch.float64, device=device)
    leaves = [inputs[k].requires_grad_() for k in ("experts_A", "experts_B", "gates")]

    def fn(A, B, gates):
        return gather_rank1_experts(A, B, inputs["indices"], gates)

    assert torch.autograd.gradcheck(fn, leaves)
    (dB,) = torch.autograd.grad(fn(*leaves).B.square().sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dB.sum().backward()


@pytest.mark.parametrize("subset", [("experts_A",), ("experts_B",), ("gates",), ("experts_A", "gates")], ids="+".join)
def test_gather_gives_each_gradient_alone(device, subset):
    inputs = make_inputs(device=device)
    names = ("experts_A", "experts_B", "gates")

    def fn(experts_A, experts_B, gates):
        A, B = gather_rank1_experts(experts_A, experts_B, inputs["indices"], gates)
        return torch.cat([A.square(), B.square()], -1)

    call = {k: inputs[k] for k in names}
    dy = torch.randn(3, 7, 5, 70, device=device)
    full, some = evaluate(fn, call, dy, names), evaluate(fn, call, dy, subset)
    assert all(torch.equal(some[k], full[k]) for k in subset)


def merged_in(dtype, weight, experts_A, experts_B, indices, gates=None, *, scaling=1.0):
    """weight + s·Σ g·b·aᵀ in ``dtype``, sum by sum."""
    A, B = experts_A[indices].to(dtype), experts_B[indices].to(dtype)
    B = B if gates is None else B * gates.to(dtype)[:, None]
    return weight.to(dtype) + torch.einsum("en,ek->nk", B * scaling, A)


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_merge(device, dtypes, gates):
    """The merged weight against fp64, and the linear layer that it makes."""
    dtype, experts_dtype = DTYPES[dtypes]
    inputs = make_inputs((), E=9, k=6, dtype=dtype, experts_dtype=experts_dtype, gates=gates, device=device)
    weight = torch.randn(29, 41, dtype=torch.float64).to(dtype).to(device)
    names = ("experts_A", "experts_B", "indices", "gates", "scaling")
    call = {"weight": weight} | {k: inputs[k] for k in names if k in inputs}
    with unchanged(*tensors_of(call)):
        merged = merge_rank1_experts(**call)
    acc, truth = accumulation_dtype(dtype), merged_in(torch.float64, **call)
    absolute = {k: v.abs() if isinstance(v, Tensor) else v for k, v in call.items()}
    deviation = compare(merged, truth, merged_in(acc, **call).to(dtype), merged_in(torch.float64, **absolute), acc)
    assert deviation.ok, str(deviation)
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}
    x = torch.randn(5, 41, dtype=torch.float64, device=device)
    wide["indices"] = wide["indices"].expand(5, 6)
    if gates:
        wide["gates"] = wide["gates"].expand(5, 6)
    frozen = wide.pop("weight")
    torch.testing.assert_close(x @ truth.mT, rank1_experts(x, **wide, base_output=x @ frozen.mT))


def test_merge_is_differentiable(device):
    inputs = make_inputs((), 4, 3, 6, 2, dtype=torch.float64, scaling=None, device=device)
    leaves = [torch.randn(3, 4, dtype=torch.float64, device=device)]
    leaves += [inputs[k] for k in ("experts_A", "experts_B", "gates", "scaling")]

    def fn(weight, A, B, gates, scaling):
        return merge_rank1_experts(weight, A, B, inputs["indices"], gates, scaling=scaling)

    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("path", [p for p in paths("bf16") if p != "dense"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="memory that is never touched costs nothing on a CPU alone")
def test_pool_beyond_32_bits(monkeypatch, path):
    """Rows on either side of element 2³¹ and 2³², in memory that is otherwise never touched."""
    from experts import check, run

    K, N, E, dtype = 1 << 17, 64, (1 << 15) + 3, torch.bfloat16  # E·K = 2³² + 3·2¹⁷ elements, 8.6 GB of addresses
    used = torch.tensor([0, 1, (1 << 14) - 1, 1 << 14, (1 << 15) - 1, 1 << 15, E - 1])
    whole = torch.empty(E, K, dtype=dtype)
    rows = torch.randn(len(used), K, dtype=torch.float64).to(dtype) * K**-0.5
    whole[used] = rows
    small = make_inputs((5,), 1, N, len(used), 4, dtype=dtype)
    x, choice = torch.randn(5, K).to(dtype), torch.randint(len(used), (5, 4))
    compact = {**small, "x": x, "experts_A": rows, "indices": choice}
    large_B = torch.empty(E, N, dtype=dtype)
    large_B[used] = compact["experts_B"]
    huge = {**compact, "experts_A": whole, "experts_B": large_B, "indices": used[choice]}
    fn, dy = run(path, monkeypatch), torch.randn(5, N).to(dtype)
    wanted = ["x", "gates"]
    got, expected = (evaluate(fn, inputs, dy, wanted) for inputs in (huge, compact))
    assert all(torch.equal(got[k], expected[k]) for k in expected)
    check(got, compact, dy, gradients=wanted)
