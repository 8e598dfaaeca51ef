"""Options of Gram-Schmidt: deficient columns, lists, bases, autocast, layouts; calls drawn by hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from orthonormal import CASES, TYPES, assert_gradients, backends, evaluate, gradients_for
from strategies import LAYOUTS, laid_out

from clora_kernels import gram_schmidt, gram_schmidt_foreach, orthonormal_basis
from clora_kernels.reference import gram_schmidt as reference
from clora_kernels.reference.gram_schmidt_samples import make_inputs
from clora_kernels.testing import assert_orthonormal, dispatched, guarded, poisoned_empty, unchanged

BACKENDS = [*backends(), "reference"]
MARGIN = {"noise": 1e-3, "rank_tol": 1e-1}


@pytest.mark.parametrize(("dtype", "backend"), CASES)
def test_random_completes_and_keeps_what_is_there(device, dtype, backend):
    inputs = make_inputs((3,), 30, 6, k=4, dtype=TYPES[dtype], device=device, dependent=(1, 4), **MARGIN)
    zero, full = (gram_schmidt(**inputs, deficient=what, backend=backend) for what in ("zero", "random"))
    kept = zero.R.diagonal(dim1=-2, dim2=-1) > 0
    assert kept.sum(-1).tolist() == zero.rank.tolist() == [4, 4, 4]
    assert torch.equal(zero.R, full.R) and torch.equal(zero.rank, full.rank)
    assert torch.equal(zero.Q, full.Q * kept[:, None, :])
    assert_orthonormal(full, inputs["V"], inputs["against"], rank_tol=1e-1, completed=True)
    torch.manual_seed(1)
    again = gram_schmidt(**inputs, deficient="random", backend=backend)
    assert torch.equal(again.Q, full.Q), "the draw does not depend on torch's generator"
    plain = gram_schmidt(**inputs, deficient="random", backend="reference")
    assert (plain.Q.double() - full.Q.double()).abs().max() < 200 * torch.finfo(full.Q.dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_fills_a_zero_matrix_and_a_square_one(device, backend):
    for d, r, k in ((1, 1, 0), (7, 7, 0), (20, 12, 8), (33, 9, 0)):
        P = torch.eye(d, device=device)[:, d - k :] if k else None
        V = torch.zeros(2, d, r, device=device)
        result = gram_schmidt(V, P, deficient="random", backend=backend)
        assert_orthonormal(result, V, P, ranks=[0, 0], completed=True)
        torch.testing.assert_close(result.Q[0], result.Q[1])


def test_completion_is_the_same_everywhere_and_never_zero(device):
    drawn = reference.completion(20, 5, device, torch.float64)
    assert drawn.abs().max() <= 65535 and (drawn % 2 == 1).all()
    assert torch.equal(drawn[:13], reference.completion(13, 5, device, torch.float64)), "element (i, j) has one value"
    assert torch.equal(drawn[:, :3], reference.completion(20, 3, device, torch.float64))
    assert drawn[:2, :3].tolist() == [[-44269, -20311, -35275], [-64377, -30165, -16723]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_raise(device, backend):
    V = make_inputs((2, 3), 30, 6, device=device)["V"]
    assert (gram_schmidt(V, deficient="raise", backend=backend).rank == 6).all()
    V[1, 0, :, 4] = V[1, 0, :, 2]
    message = r"V: got a matrix at \(1, 0\) with 5 independent columns, expected 6"
    with pytest.raises(torch.linalg.LinAlgError, match=message):
        gram_schmidt(V, deficient="raise", backend=backend)
    V[0, 2, 3, 3] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError, match=r"V: got a matrix at \(0, 2\) with NaN or Inf"):
        gram_schmidt(V, deficient="raise", backend=backend)
    with pytest.raises(torch.linalg.LinAlgError, match=r"matrices\[1\]: got a matrix with 5 independent columns"):
        gram_schmidt_foreach([V[1, 1], V[1, 0]], deficient="raise", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_basis_that_is_not_finite_spoils_its_own_matrices_alone(device, backend):
    inputs = make_inputs((3,), 30, 6, k=4, device=device)
    expected = gram_schmidt(**inputs, backend=backend)
    inputs["against"][1, 5, 2] = torch.inf
    result = gram_schmidt(**inputs, backend=backend)
    assert result.rank.tolist() == [6, -1, 6] and result.Q[1].isnan().all() and result.R[1].isnan().all()
    for got, right in zip(result, expected, strict=True):
        torch.testing.assert_close(got[[0, 2]], right[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_foreach_is_one_by_one(device, backend):
    shapes = [((), 30, 6, 4), ((2,), 30, 6, 4), ((), 41, 3, 0), ((3, 2), 30, 6, 0), ((), 30, 6, 4), ((0,), 30, 6, 0)]
    shapes.append(((), 8, 8, 0))
    samples = [make_inputs(lead, d, r, k=k, device=device, seed=i) for i, (lead, d, r, k) in enumerate(shapes)]
    Vs, bases = [s["V"] for s in samples], [s.get("against") for s in samples]
    Vs[4] = Vs[4].mT.contiguous().mT
    for deficient in ("zero", "random"):
        chosen = [i for i, (_, d, r, k) in enumerate(shapes) if deficient == "zero" or r + k <= d]
        some, theirs = [Vs[i] for i in chosen], [bases[i] for i in chosen]
        results = gram_schmidt_foreach(some, theirs, deficient=deficient, backend=backend)
        assert len(results) == len(chosen)
        for i, result in zip(chosen, results, strict=True):
            alone = gram_schmidt(Vs[i], bases[i], deficient=deficient, backend=backend)
            for got, right in zip(result, alone, strict=True):
                assert got.shape == right.shape and got.dtype == right.dtype and got.stride() == right.stride()
                if backend == "native":
                    assert torch.equal(got, right)
                else:
                    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)
    assert gram_schmidt_foreach([], backend=backend) == []
    without = gram_schmidt_foreach(Vs, backend=backend)
    assert_orthonormal(without[0], Vs[0])


def test_foreach_takes_a_handful_of_launches(device):
    """What runs does not grow with the number of matrices."""
    Vs = [make_inputs((), d, 6, device=device, seed=i)["V"] for i in range(10) for d in (30, 50)]
    expected = {
        "aten": 2 * ["gram_schmidt.aten.forward"],
        "native": ["gram_schmidt.layer.forward"],
        "triton": 2 * ["gram_schmidt.triton.forward"],
    }
    for backend in backends():
        with dispatched() as few:
            gram_schmidt_foreach(Vs[:2], backend=backend)
        with dispatched() as many:
            gram_schmidt_foreach(Vs, backend=backend)
        ran = [name for name in few if name.endswith(".forward")]
        assert many == few and ran == expected[backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_orthonormal_basis(device, backend):
    inputs = make_inputs((3,), 30, 6, k=4, device=device, dependent=(0, 3), noise=1e-3, rank_tol=1e-1)
    basis, rank = orthonormal_basis(**inputs, backend=backend)
    result = gram_schmidt(**inputs, backend=backend)
    assert rank.tolist() == [4, 4, 4] and not basis[..., 4:].any()
    assert torch.equal(basis[..., :4], result.Q[..., [1, 2, 4, 5]])
    one = orthonormal_basis(inputs["V"][0], inputs["against"][0], rank_tol=1e-1, trim=True, backend=backend)
    assert one.Q.shape == (30, 4) and one.rank == 4
    torch.testing.assert_close(one.Q, basis[0, :, :4], rtol=1e-5, atol=1e-6)
    spoilt = inputs["V"][0].clone()
    spoilt[3, 3] = torch.nan
    assert orthonormal_basis(spoilt, backend=backend).Q.isnan().all()
    with pytest.raises(torch.linalg.LinAlgError, match="V: got a matrix with NaN or Inf"):
        orthonormal_basis(spoilt, trim=True, backend=backend)
    zero = orthonormal_basis(torch.zeros(9, 3, device=device), trim=True, backend=backend)
    assert zero.Q.shape == (9, 0) and zero.rank == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(device, backend):
    inputs = make_inputs(k=4, device=device)
    dQ, dR = gradients_for(inputs)
    expected, expected_grads = evaluate(inputs, dQ, dR, backend=backend)
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = gram_schmidt(**leaves, backend=backend)
        if backend != "reference":  # whose backward is autograd's, and that must not run under autocast
            _, grads = evaluate(inputs, dQ, dR, backend=backend)
            assert all(torch.equal(grads[k], expected_grads[k]) for k in grads)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    grads = torch.autograd.grad([result.Q, result.R], list(leaves.values()), [dQ, dR])
    assert all(torch.equal(g, e) for g, e in zip(grads, expected_grads.values(), strict=True))


@pytest.mark.parametrize("backend", backends())
def test_less_exact_matmuls_of_the_user_change_nothing(device, backend):
    inputs = make_inputs((4,), 300, 32, k=16, device=device)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        dQ, dR = gradients_for(inputs)
        result, grads = evaluate(inputs, dQ, dR, backend=backend)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_orthonormal(result, **inputs)
    assert_gradients(grads, inputs, dQ, dR)


@pytest.mark.parametrize("layout", [*LAYOUTS[:-1], "mT"])
@pytest.mark.parametrize(("dtype", "backend"), CASES)
def test_layouts(device, layout, dtype, backend):
    """Whatever the strides, the same numbers; Q lies in memory as V does."""
    inputs = make_inputs((3,), 45, 20, k=4, dtype=TYPES[dtype], device=device, dependent=(5,), **MARGIN)
    expected = gram_schmidt(**inputs, backend=backend)
    V, P = ((t.mT.contiguous().mT if layout == "mT" else laid_out(t, layout)) for t in (inputs["V"], inputs["against"]))
    with unchanged(V, P), poisoned_empty():
        result = gram_schmidt(V, P, rank_tol=1e-1, backend=backend)
    assert result.Q.stride() == torch.empty_like(V).stride()
    assert_orthonormal(result, V, P, rank_tol=1e-1, ranks=[19] * 3)
    for got, right in zip(result, expected, strict=True):
        if backend == "native":
            assert torch.equal(got, right)
        else:
            assert (got.double() - right.double()).abs().max() < 16 * torch.finfo(V.dtype).eps * (1 + right.abs().max())


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_and_guarded(device, backend, offset):
    inputs = make_inputs((2,), 37, 5, k=3, device=device)
    expected = gram_schmidt(**inputs, backend=backend)
    with guarded(inputs["V"], offset) as V, guarded(inputs["against"], offset) as P:
        result = gram_schmidt(V, P, backend=backend)
    for got, right in zip(result, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", backends())
def test_one_matrix_that_stands_for_all(device, backend):
    """V of stride 0 over its batch."""
    V = make_inputs((), 37, 5, device=device)["V"].expand(3, 2, 37, 5)
    result = gram_schmidt(V, backend=backend)
    assert_orthonormal(result, V, ranks=[5] * 6)
    assert torch.equal(result.Q, result.Q[:1, :1].expand_as(result.Q))


@st.composite
def calls(draw: st.DrawFn):
    d = draw(st.integers(1, 70))
    r = draw(st.sampled_from([1, 2, 3, 5, 8, 12, 16, 17, 33, 40]))
    k = draw(st.sampled_from([0, 0, 1, 3, 9]))
    dtype = draw(st.sampled_from(list(TYPES.values())))
    lead = draw(st.lists(st.integers(0, 3), max_size=2))
    broad = [draw(st.sampled_from([n, 1])) for n in lead]
    dependent = sorted(draw(st.sets(st.integers(0, r - 1), max_size=3)))
    options = {"dtype": dtype, "dependent": dependent, "noise": 1e-3, "rank_tol": 3e-2}
    against_lead = broad[draw(st.integers(0, len(broad))) :]
    seed = draw(st.integers(0, 2**20))
    inputs = make_inputs(lead, d, r, k=min(k, d), against_lead=against_lead, seed=seed, **options)
    for name in ("V", "against"):
        if name in inputs:
            inputs[name] = laid_out(inputs[name], draw(st.sampled_from(LAYOUTS[:-1])))
    return inputs, draw(st.sampled_from(["zero", "random"])), draw(st.sampled_from(LAYOUTS))


@given(calls())
def test_any_call(call):
    inputs, deficient, layout = call
    V, P = inputs["V"], inputs.get("against")
    (d, r), k = V.shape[-2:], 0 if P is None else P.shape[-1]
    deficient = deficient if r + k <= d else "zero"
    for backend in [*backends(V.dtype), "reference"]:
        dQ, dR = gradients_for(inputs, layout)
        result, grads = evaluate(inputs, dQ, dR, backend=backend, deficient=deficient)
        assert_orthonormal(result, V, P, rank_tol=inputs["rank_tol"], completed=deficient == "random")
        assert all(grads[name].shape == inputs[name].shape and grads[name].isfinite().all() for name in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_basis_in_another_precision(device, backend):
    """fp64 beside an fp32 V: taken as it is or in fp32, and its gradient comes in fp64."""
    inputs = make_inputs((2,), 41, 7, k=4, device=device, against_dtype=torch.float64)
    V, P = inputs["V"].requires_grad_(), inputs["against"].requires_grad_()
    result = gram_schmidt(V, P, backend=backend)
    assert_orthonormal(result, V.detach(), P.detach(), ranks=[7, 7])
    dV, dP = torch.autograd.grad(result.Q.sin().sum() + result.R.sum(), [V, P])
    assert dV.dtype == torch.float32 and dP.dtype == torch.float64
    single = gram_schmidt(V, P.float(), backend=backend)
    expected = torch.autograd.grad(single.Q.sin().sum() + single.R.sum(), [V, P])
    for got, want in zip((dV, dP), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank_tol", [1e-2, 0.3, 0.9])
def test_random_completes_whatever_the_tolerance_of_the_call(device, backend, rank_tol):
    """Which is that of the columns that came, not of those that are drawn."""
    inputs = make_inputs((16,), 8, 8, device=device, dependent=(2, 5, 6), noise=1e-3)
    result = gram_schmidt(inputs["V"], rank_tol=rank_tol, deficient="random", backend=backend)
    assert_orthonormal(result, inputs["V"], rank_tol=rank_tol, completed=True)
    V = torch.zeros(70, 70, device=device)
    result = gram_schmidt(V, rank_tol=rank_tol, deficient="random", backend=backend)
    assert_orthonormal(result, V, ranks=[0], completed=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matrix_that_is_not_finite_gives_no_gradient_to_a_basis_it_shares(device, backend):
    inputs = make_inputs((3,), 41, 7, k=4, device=device, against_lead=())
    spoilt = inputs["V"].clone()
    spoilt[1, 3, 2] = torch.nan
    grads = []
    for V, rows in ((spoilt, [0, 2]), (inputs["V"][[0, 2]], [0, 1])):
        P = inputs["against"].detach().requires_grad_()
        grads += torch.autograd.grad(gram_schmidt(V, P, backend=backend).Q[rows].sin().sum(), P)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", backends())
def test_precision_that_is_set_backend_by_backend(device, backend):
    """Of which torch gives no one name, and raises where it is asked for it."""
    V = make_inputs((2,), 41, 7, device=device)["V"]
    expected = gram_schmidt(V, backend=backend)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        result = gram_schmidt(V, backend=backend)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert_orthonormal(result, V, ranks=[7, 7])
    torch.testing.assert_close(result.Q, expected.Q, rtol=0, atol=1e-6)
