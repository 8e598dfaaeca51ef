"""``solve``, the r×r work of Gram-Schmidt's backward in Triton, against ATen's fp64; what backward launches."""

from __future__ import annotations

import importlib

import pytest
import torch
from orthonormal import assert_gradients, evaluate, gradients_for
from torch.utils._python_dispatch import TorchDispatchMode

from clora_kernels.dispatch.routed_lora import why_not_triton
from clora_kernels.kernels.gram_schmidt import algebra, aten
from clora_kernels.reference.gram_schmidt_samples import make_inputs
from clora_kernels.testing import compare, guarded, poisoned_empty, unchanged

pytest.importorskip("triton")
from clora_kernels.kernels.gram_schmidt import triton as kernels

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(bool(why := why_not_triton(torch.float32, _DEVICE, None)), reason=why or "runs"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy's, of NaN in the interpreter
]


def operands(r, dropped, device, seed=0):
    """R, dR, QdQ, QV [B, r, r] of matrices that drop the columns ``dropped`` [B]; of None R is NaN. What nobody may
    read is NaN: dR below its diagonal, QV of independent columns."""
    generator = torch.Generator().manual_seed(seed)
    R, dR, QdQ, QV = torch.randn(4, len(dropped), r, r, generator=generator)
    R = R.triu(1) / r**0.5 + torch.diag_embed(R.diagonal(dim1=-2, dim2=-1).abs() + 0.5)
    for i, columns in enumerate(dropped):
        kept = torch.ones(r, dtype=torch.bool)
        kept[list(columns or ())] = False
        R[i, ~kept] = 0
        QdQ[i, ~kept] = QV[i, ~kept] = 0  # Q is zero there
        QV[i, :, kept] = torch.nan
        if columns is None:
            R[i] = torch.nan
    below = torch.ones(r, r, dtype=torch.bool).tril(-1)
    return [t.to(device) for t in (R, dR.masked_fill(below, torch.nan), QdQ, QV)]


def magnitudes(R, dR, QdQ, QV):
    """|R⁻¹|·|R|·|R⁻¹| and what comes of it and of the absolute values of all else, for one matrix."""
    kept = R.diagonal() != 0
    R, dR, QdQ, QV = (t.double().abs() for t in (R, dR.triu(), QdQ, QV))
    R_JJ = torch.where(kept & kept[:, None], R, torch.eye(len(R), dtype=R.dtype))
    inverse = torch.linalg.inv(R_JJ).abs()
    Y = (inverse @ R_JJ @ inverse).mT * kept * kept[:, None]
    M = torch.where(kept, R, 0.0) @ dR.mT + QdQ.mT + torch.where(kept, 0.0, dR) @ QV.mT
    return Y, torch.where(kept, (M + M.mT) @ Y, dR), torch.where(kept, 0.0, dR).mT @ Y


# Around blocks of 16, 32 and 64 columns, and several blocks; columns dropped within blocks, at their ends, all of one.
SIZES = [
    (1, (0,)),
    (15, (0, 14)),
    (17, (3, 16)),
    (31, (0, 1, 30)),
    (33, (32,)),
    (64, (7, 63)),
    (70, (0, 63, 64, 66)),
    (130, (*range(64, 128), 129)),
]


@pytest.mark.parametrize(("r", "some"), SIZES)
def test_sizes(device, r, some):
    """Matrices that drop nothing, some columns, and all, beside one of NaN that spoils none of them."""
    R, dR, QdQ, QV = operands(r, [(), some, None, tuple(range(r))], device)
    with unchanged(R, dR, QdQ, QV), poisoned_empty():
        found = kernels.solve(R, dR, QdQ, QV, torch.float64)
    assert all(t.is_contiguous() for t in found) and found[1][2].isnan().all()
    R, dR, QdQ, QV = (t.cpu() for t in (R, dR, QdQ, QV.nan_to_num(0.0)))
    truth = aten.solve(R, dR, QdQ, QV, torch.float64)
    for i in (0, 1, 3):
        for got, expected, bound in zip(found, truth, magnitudes(R[i], dR[i], QdQ[i], QV[i]), strict=True):
            deviation = compare(got[i].cpu(), expected[i], expected[i], bound, torch.float64)
            assert deviation.ok, deviation


def test_fp32_is_fp64_rounded(device):
    given = operands(33, [(0, 16), ()], device)
    wide, narrow = (kernels.solve(*given, dtype) for dtype in (torch.float64, torch.float32))
    assert all(torch.equal(a, b.float()) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("layout", ["transposed", "stepped", "bf16", "zero"])
def test_layouts(device, layout):
    R, dR, QdQ, QV = operands(18, [(2,), (0, 17)], device)
    if layout == "transposed":
        given = dR.mT.contiguous().mT
    elif layout == "stepped":
        given = dR.new_full((2, 20, 40), torch.nan)[:, 1:19, 3:39:2].copy_(dR)
    else:
        given = dR.bfloat16() if layout == "bf16" else dR.new_zeros(()).expand_as(dR)
    expected = kernels.solve(R, given.float().contiguous(), QdQ, QV, torch.float32)
    found = kernels.solve(R.mT.contiguous().mT, given, QdQ, QV, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bits_depend_on_nothing_but_the_matrix(device):
    given = operands(21, [(5,), None, (), (0, 20)], device)
    whole = kernels.solve(*given, torch.float64)
    for i in (0, 2, 3):
        alone = kernels.solve(*(t[i : i + 1] for t in given), torch.float64)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("offset", [0, 1])
def test_nothing_is_written_outside(device, offset):
    given = operands(17, [(5,)], device)
    given[1], given[3] = given[1].nan_to_num(0.0), given[3].nan_to_num(0.0)
    expected = kernels.solve(*given, torch.float32)
    with guarded(given[0], offset) as R, guarded(given[1], offset) as dR:
        found = kernels.solve(R, dR, *given[2:], torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("k", [0, 3])
def test_gradients_of_several_blocks(device, k):
    inputs = make_inputs((2,), 80, 70, k=k, device=device, dependent=(9, 63, 64, 69), seed=3)
    dQ, dR = gradients_for(inputs)
    with poisoned_empty():
        _, grads = evaluate(inputs, dQ, dR, backend="triton")
    assert_gradients(grads, inputs, dQ, dR)


class Operations(TorchDispatchMode):
    """The names of what ATen is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_is_six_launches_and_nothing_else(device, dtype, monkeypatch):
    launched = []
    for name in ("products", "solve"):
        module = importlib.import_module(f"{kernels.__name__}.{name}")
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    V = torch.randn(2, 40, 5, device=device).to(dtype)
    R = torch.randn(2, 5, 5, device=device).triu()
    outputs = algebra.Outputs(V, R, V, R.new_zeros(()).expand_as(R))
    with Operations() as asked:
        dV, dP = algebra.backward(kernels, outputs, algebra.Columns(V, None), True, False)
    assert dV.dtype == dtype and dP is None
    assert launched == 2 * ["inner_kernel", "inner_sums_kernel"] + ["solve_kernel", "combine_kernel"]
    assert {*asked.names} == {"aten::empty.memory_format"}
