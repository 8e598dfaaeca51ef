"""Gram-Schmidt under torch.compile: one graph, the bits of eager mode, no graph for each size or batch."""

from __future__ import annotations

import pytest
import torch
from orthonormal import TYPES, assert_gradients, backends, evaluate, gradients_for
from torch._dynamo.testing import CompileCounterWithBackend

from clora_kernels import gram_schmidt, gram_schmidt_foreach, orthonormal_basis
from clora_kernels.reference.gram_schmidt_samples import make_inputs, sample_inputs


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", [name for name, _ in sample_inputs()])
def test_fullgraph_of_every_sample(device, name, backend):
    inputs = dict(sample_inputs(device=device))[name]
    compiled = torch.compile(gram_schmidt, fullgraph=True, backend="aot_eager")
    assert same(compiled(**inputs, backend=backend), gram_schmidt(**inputs, backend=backend))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fullgraph_forward_and_backward(device, dtype):
    for backend in backends(TYPES[dtype]):
        inputs = make_inputs(k=3, dtype=TYPES[dtype], device=device, dependent=(2,), noise=1e-3, rank_tol=1e-1)
        dQ, dR = gradients_for(inputs)
        compiled = torch.compile(gram_schmidt, fullgraph=True, backend="aot_eager")
        result, grads = evaluate(inputs, dQ, dR, compiled, backend=backend)
        assert same(result, gram_schmidt(**inputs, backend=backend))
        assert_gradients(grads, inputs, dQ, dR)


def test_inductor(device):
    inputs = {k: v.requires_grad_() for k, v in make_inputs(k=3, device=device).items()}

    def loss(inputs):
        Q, R, _ = gram_schmidt(**{k: 2 * v if k == "V" else v for k, v in inputs.items()}, deficient="random")
        return Q.sin().sum() + R.square().sum()

    value, expected = torch.compile(loss, fullgraph=True)(inputs), loss(inputs)
    torch.testing.assert_close(value, expected)
    leaves = list(inputs.values())
    grads, expected_grads = (torch.autograd.grad(v, leaves) for v in (value, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", backends())
def test_a_list_and_a_basis(device, backend):
    samples = [make_inputs((2,), 11, 4, k=3, device=device), make_inputs((), 20, 7, device=device, dependent=(1,))]
    Vs, bases = [s["V"] for s in samples], [s.get("against") for s in samples]

    def run(Vs):
        results = gram_schmidt_foreach(Vs, bases, backend=backend)
        return [t for result in results for t in result] + list(orthonormal_basis(Vs[1], backend=backend))

    assert same(torch.compile(run, fullgraph=True, backend="aot_eager")(Vs), run(Vs))


def test_a_matrix_with_dependent_columns_raises(device):
    compiled = torch.compile(gram_schmidt, fullgraph=True, backend="aot_eager")
    V = make_inputs(device=device)["V"]
    assert same(compiled(V, deficient="raise"), gram_schmidt(V))
    with pytest.raises(torch.linalg.LinAlgError, match=r"V: got a matrix at \(0,\) with 1 independent columns"):
        compiled(torch.ones_like(V), deficient="raise")


def test_two_graphs_for_every_size(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gram_schmidt, fullgraph=True, backend=counter)
    for B, d, r in [(2, 41, 7), (3, 50, 9), (4, 60, 11), (7, 64, 3), (8, 300, 33)]:
        V = make_inputs((B,), d, r, device=device)["V"].requires_grad_()
        compiled(V, rank_tol=1e-4).Q.sum().backward()
        assert V.grad.shape == V.shape
    assert counter.frame_count <= 2


def test_no_grad_and_inference_mode(device):
    V = make_inputs(device=device)["V"].requires_grad_()
    compiled = torch.compile(gram_schmidt, fullgraph=True, backend="aot_eager")
    expected = gram_schmidt(V.detach())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert same(compiled(V), expected) and same(gram_schmidt(V), expected)
