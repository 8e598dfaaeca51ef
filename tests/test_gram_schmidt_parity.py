"""Gram-Schmidt on every sample, backend and dtype: gates in fp64, torch.linalg.qr, gradients against fp64."""

from __future__ import annotations

import pytest
import torch
from orthonormal import CASES, TYPES, assert_gradients, evaluate, gradients_for
from strategies import LAYOUTS

from clora_kernels import gram_schmidt
from clora_kernels.reference import gram_schmidt as reference
from clora_kernels.reference.gram_schmidt_samples import make_inputs, sample_inputs
from clora_kernels.testing import assert_orthonormal, dispatched, poisoned_empty, unchanged

NAMES = [name for name, _ in sample_inputs()]


@pytest.mark.parametrize(("dtype", "backend"), [*CASES, *((name, "reference") for name in TYPES)])
@pytest.mark.parametrize("name", NAMES)
def test_samples(device, name, dtype, backend):
    inputs = dict(sample_inputs(TYPES[dtype], device))[name]
    V, against = inputs["V"], inputs.get("against")
    tensors = [t for t in (V, against) if t is not None]
    with unchanged(*tensors), poisoned_empty():
        result = gram_schmidt(**inputs, backend=backend)
    Q, R, rank = result
    assert Q.shape == V.shape and Q.dtype == V.dtype and R.dtype == reference.accumulation_dtype(V.dtype)
    assert R.shape == (*V.shape[:-2], V.shape[-1], V.shape[-1]) and rank.shape == V.shape[:-2]
    assert rank.dtype == torch.int32
    assert torch.equal(rank, reference.forward(**inputs).rank)
    assert_orthonormal(result, V, against, rank_tol=inputs.get("rank_tol"))


@pytest.mark.parametrize(("dtype", "backend"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_samples(device, name, dtype, backend):
    inputs = dict(sample_inputs(TYPES[dtype], device))[name]
    dQ, dR = gradients_for(inputs)
    _, grads = evaluate(inputs, dQ, dR, backend=backend)
    assert_gradients(grads, inputs, dQ, dR)


@pytest.mark.parametrize("name", NAMES)
def test_the_backward_by_hand_is_that_of_autograd(device, name):
    """In fp64, where rounding hides nothing: the measure of all others is right itself."""
    inputs = dict(sample_inputs(torch.float64, device))[name]
    dQ, dR = gradients_for(inputs)
    result, truth = evaluate(inputs, dQ, dR, reference.forward)
    with torch.no_grad():
        got = reference.backward(dQ, dR, inputs["V"], inputs.get("against"), result.Q, result.R)._asdict()
    for key, expected in truth.items():
        difference = torch.linalg.vector_norm(got[key].double() - expected)
        allowed = 1e-4 if inputs[key].dtype.itemsize == 2 else 1e-9  # a 16-bit basis gets a 16-bit gradient
        assert difference <= allowed * (1 + torch.linalg.vector_norm(expected)), key


@pytest.mark.parametrize(("dtype", "backend"), CASES)
def test_it_is_qr_with_a_positive_diagonal(device, dtype, backend):
    V = make_inputs((4,), 61, 9, dtype=TYPES[dtype], device=device)["V"]
    Q, R, rank = gram_schmidt(V, backend=backend)
    expected = torch.linalg.qr(V.double())
    sign = expected.R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    eps = torch.finfo(Q.dtype).eps
    assert (Q.double() - expected.Q * sign).abs().max() < 4 * eps
    eps = torch.finfo(R.dtype).eps
    assert (R.double() - sign.mT * expected.R).abs().max() < 8 * eps * expected.R.abs().max()
    assert (rank == 9).all() and (R.diagonal(dim1=-2, dim2=-1) > 0).all()


@pytest.mark.parametrize(("dtype", "backend"), CASES)
def test_gradients_are_those_of_qr(device, dtype, backend):
    """Against fp64 autograd of torch.linalg.qr, its signs made those of a positive diagonal."""
    inputs = make_inputs((4,), 61, 9, dtype=TYPES[dtype], device=device)
    dQ, dR = gradients_for(inputs)
    V = inputs["V"].double().requires_grad_()
    Q, R = torch.linalg.qr(V)
    sign = R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :].detach()
    (expected,) = torch.autograd.grad([Q * sign, R * sign.mT], V, [dQ.double(), dR.double()])
    _, grads = evaluate(inputs, dQ, dR, backend=backend)
    eps = torch.finfo(inputs["V"].dtype).eps
    assert (grads["V"].double() - expected).norm() < 4 * eps * expected.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "backend"), CASES)
def test_gradients_in_any_layout(device, layout, dtype, backend):
    inputs = make_inputs((3,), 37, 6, k=4, dtype=TYPES[dtype], device=device)
    dQ, dR = gradients_for(inputs, layout)
    with unchanged(dQ, dR, *inputs.values()):
        _, grads = evaluate(inputs, dQ, dR, backend=backend)
    assert_gradients(grads, inputs, dQ.contiguous(), dR.contiguous())


@pytest.mark.parametrize(("dtype", "backend"), CASES)
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (768, 4), (1000, 17), (513, 64), (300, 256)])
def test_shapes(device, shape, dtype, backend):
    inputs = make_inputs((2,), *shape, dtype=TYPES[dtype], device=device)
    dQ, dR = gradients_for(inputs)
    with dispatched() as calls:
        result, grads = evaluate(inputs, dQ, dR, backend=backend)
    assert {call.split(".")[1] for call in calls} == {"aten" if backend == "aten" else "layer"}
    assert_orthonormal(result, inputs["V"], ranks=[shape[1]] * 2)
    if shape[0] > shape[1]:  # of a square random matrix the last column is nearly dependent
        assert_gradients(grads, inputs, dQ, dR)
