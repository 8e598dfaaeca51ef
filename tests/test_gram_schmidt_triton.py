"""The Triton kernels of Gram-Schmidt: samples, hard matrices, sizes around their blocks, bits, launches."""

from __future__ import annotations

import pytest
import torch
from orthonormal import TYPES, assert_gradients, evaluate, gradients_for
from strategies import laid_out

from clora_kernels import explain, gram_schmidt, gram_schmidt_foreach, info, orthonormal_basis
from clora_kernels.dispatch.routed_lora import why_not_triton
from clora_kernels.kernels.gram_schmidt.algebra import AGAIN, DONE, HARD, Columns
from clora_kernels.reference import gram_schmidt as reference
from clora_kernels.reference.gram_schmidt_samples import make_inputs, sample_inputs
from clora_kernels.testing import (
    assert_orthonormal,
    guarded,
    hard_matrices,
    launches,
    mixed_batch,
    poisoned_empty,
    unchanged,
)

pytest.importorskip("triton")
from clora_kernels.kernels.gram_schmidt.triton.deflate import deflate
from clora_kernels.kernels.gram_schmidt.triton.products import combine_into, inner_parts
from clora_kernels.kernels.gram_schmidt.triton.small import small
from clora_kernels.kernels.gram_schmidt.triton.step import Work, step
from clora_kernels.kernels.gram_schmidt.triton.sweeps import sweeps

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(bool(why := why_not_triton(torch.float32, _DEVICE, None)), reason=why or "runs"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy's, of NaN in the interpreter
]
NAMES = [name for name, _ in sample_inputs()]
SOME = ["batch", "against", "dependent_against", "dependent_exactly", "strided", "wide"]
CASES = [(name, "fp32") for name in NAMES] + [(name, dtype) for dtype in ("bf16", "fp16") for name in SOME]


def checked(inputs, dQ, dR, **options):
    """The result and gradients of a call whose inputs stay as they are and which reads no memory that nobody wrote."""
    tensors = [t for t in (inputs["V"], inputs.get("against"), dQ, dR) if t is not None]
    with unchanged(*tensors), poisoned_empty():
        return evaluate(inputs, dQ, dR, backend="triton", **options)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_samples(device, name, dtype):
    inputs = dict(sample_inputs(TYPES[dtype], device))[name]
    dQ, dR = gradients_for(inputs)
    result, grads = checked(inputs, dQ, dR)
    V = inputs["V"]
    assert result.Q.dtype == V.dtype and result.R.dtype == torch.float32 and result.rank.dtype == torch.int32
    assert torch.equal(result.rank, reference.forward(**inputs).rank)
    assert_orthonormal(result, V, inputs.get("against"), rank_tol=inputs.get("rank_tol"))
    assert_gradients(grads, inputs, dQ, dR)


# Around blocks of 16, 32 and 64 columns and of 64 rows, splits of 1024 rows; columns of P beyond one block.
SIZES = [(63, 16, 0), (64, 17, 5), (65, 33, 0), (1025, 3, 17), (90, 64, 0), (90, 65, 3), (80, 4, 70), (9, 12, 0)]


@pytest.mark.parametrize(("d", "r", "k"), SIZES)
def test_sizes(device, d, r, k):
    inputs = make_inputs((2,), d, r, k=k, device=device, seed=d)
    dQ, dR = gradients_for(inputs)
    result, grads = checked(inputs, dQ, dR)
    assert_orthonormal(result, inputs["V"], inputs.get("against"), ranks=[min(r, d)] * 2)
    if r <= d:
        assert_gradients(grads, inputs, dQ, dR)


@pytest.mark.parametrize(("dtype", "deficient"), [("fp32", "random"), ("bf16", "zero")])
def test_hard_matrices_among_easy_ones(device, dtype, deficient):
    V, matrices = mixed_batch(hard_matrices(41, 6, dtype=TYPES[dtype], device=device), easy=3)
    with poisoned_empty():
        result = gram_schmidt(V, backend="triton", deficient=deficient)
    assert_orthonormal(result, V, ranks=[m.rank for m in matrices], completed=deficient == "random")


def test_hard_matrices_beside_a_basis(device):
    d, r, k = 41, 4, 9
    P = make_inputs((), d, r, k=k, device=device)["against"]
    V, matrices = mixed_batch(hard_matrices(d, r, device=device), easy=2)
    ranks = [-1 if m.rank == -1 else None for m in matrices]
    assert_orthonormal(gram_schmidt(V, P, backend="triton"), V, P, ranks=ranks)
    inside = P @ torch.randn(k, r, device=device)
    V = torch.stack([inside + share * torch.randn(d, r, device=device) for share in (1e-1, 1e-2, 1e-3, 1e-4)])
    assert_orthonormal(gram_schmidt(V, P, backend="triton"), V, P, ranks=[r] * 4)
    spoilt = P.repeat(4, 1, 1)
    spoilt[2, 3, 1] = torch.inf
    assert gram_schmidt(V, spoilt, backend="triton").rank.tolist() == [r, r, -1, r]


def test_every_way_is_taken_and_hard_ones_are_left_alone(device):
    """One sweep, two sweeps, deflation; what is asked for is all that is written."""
    easy = torch.randn(50, 6, device=device)
    skewed = easy @ torch.diag(torch.tensor([1.0] * 6)).to(device) + 8 * easy[:, :1]
    same = easy.clone()
    same[:, 3] = same[:, 1]
    columns = Columns(torch.stack([easy, skewed, same]), None)
    work, tol = Work.empty(columns), reference.tolerance(None, torch.float32)
    G = inner_parts(columns.V, columns.V)
    step(G, None, tol, work, False)
    again, after = work.state
    assert again.tolist() == [DONE, AGAIN, HARD]
    once, swept, twice = (torch.full_like(columns.V, 7.0) for _ in range(3))
    combine_into(once, [(columns.V, work.x)], again, swept)
    combine_into(twice, [(swept, work.x)], again, second=True)
    for written in (swept, twice):
        assert (written[[0, 2]] == 7).all() and not (written[1] == 7).any()
    assert not (once[:2] == 7).any() and torch.equal(once[1], swept[1])
    before = G.clone()
    inner_parts(swept, swept, G, again)
    assert torch.equal(G[:, [0, 2]], before[:, [0, 2]]) and not torch.equal(G[:, 1], before[:, 1])
    step(G, None, tol, work, True)
    assert after.tolist() == [DONE, DONE, HARD]
    for way in (small, sweeps):
        assert way(columns, tol)[2].tolist() == [DONE, DONE, HARD]
    result = gram_schmidt(columns.V, backend="triton")
    assert_orthonormal(result, columns.V, ranks=[6, 6, 5])
    more = torch.cat([columns.V, columns.V[:, :1].expand(3, 3000, 6) * 0], 1)  # the same, too large for one program
    assert_orthonormal(gram_schmidt(more, backend="triton"), more, ranks=[6, 6, 5])


def test_what_sweeps_did_not_get_done_is_deflated(device):
    """Hard matrices, and those that would go a third time; the others keep what they have, and have full rank."""
    V = torch.randn(3, 50, 6, device=device)
    Q, R = torch.full_like(V, 7.0), torch.full((3, 6, 6), 7.0, device=device)
    state = torch.tensor([DONE, AGAIN, HARD], dtype=torch.int32, device=device)
    result = deflate(Columns(V, None), Q, R, state, reference.tolerance(None, torch.float32))
    assert result.rank.tolist() == [6, 6, 6] and (result.Q[0] == 7).all() and (result.R[0] == 7).all()
    assert_orthonormal(type(result)(*(t[1:] for t in result)), V[1:], ranks=[6, 6])


def test_second_sweeps_start_from_what_is_not_rounded(device):
    """In 16 bit Q is rounded, what a second sweep starts from is not; nor is it where columns fill several blocks."""
    easy = torch.randn(150, 70, device=device)
    V = easy[None] + easy[:, :1]
    work = Work.empty(Columns(V, None))
    step(inner_parts(V, V), None, reference.tolerance(None, V.dtype), work, False)
    assert work.state[0].tolist() == [AGAIN]
    assert_orthonormal(gram_schmidt(V, backend="triton"), V, ranks=[70])
    V = torch.stack([easy[:60, :20], easy[:60, :20] + 4 * easy[:60, :1]]).bfloat16()
    work, tol = Work.empty(Columns(V, None)), reference.tolerance(None, V.dtype)
    step(inner_parts(V, V), None, tol, work, False)
    assert work.state[0].tolist() == [DONE, AGAIN]
    with poisoned_empty():
        assert sweeps(Columns(V, None), tol)[2].tolist() == [DONE, DONE]
        R = gram_schmidt(V, backend="triton").R
    truth = reference.forward(V.double(), None, rank_tol=tol).R
    assert (((R - truth).norm(dim=(1, 2)) / truth.norm(dim=(1, 2))) < 1e-5).all()


def test_bits_depend_on_nothing_but_the_matrix(device):
    sound = make_inputs((3,), 41, 5, k=4, device=device, dependent=(3,))
    chosen = ("hilbert", "nan", "condition_1e4", "multiples")
    hard = [m.V for m in hard_matrices(41, 5, device=device) if m.name in chosen]
    V = torch.stack([sound["V"][0], *hard, *sound["V"][1:]])
    P = torch.stack([sound["against"][i] for i in (0, 0, 0, 0, 0, 1, 2)])
    dQ, dR = gradients_for({"V": V})
    places = [0, 5, 6]
    mixed, of_mixed = evaluate({"V": V, "against": P}, dQ, dR, backend="triton")
    for _ in range(2):
        alone, grads = evaluate(sound, dQ[places], dR[places], backend="triton")
        for one, many in zip([*alone, *grads.values()], [*mixed, *of_mixed.values()], strict=True):
            assert torch.equal(one, many[places])
    again, of_again = evaluate({"V": V, "against": P}, dQ, dR, backend="triton")
    for one, other in zip([*again, *of_again.values()], [*mixed, *of_mixed.values()], strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("layout", ["transposed", "stepped"])
def test_layouts(device, layout):
    inputs = make_inputs((2,), 41, 7, k=4, device=device, dependent=(3,))
    dQ, dR = gradients_for(inputs)
    expected, of_expected = evaluate(inputs, dQ, dR, backend="triton")
    strided = {k: laid_out(t, layout) for k, t in inputs.items()}
    result, grads = evaluate(strided, laid_out(dQ, layout), laid_out(dR, layout), backend="triton")
    for one, other in zip([*result, *grads.values()], [*expected, *of_expected.values()], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_nothing_is_written_outside(device, offset):
    inputs = make_inputs((2,), 67, 7, k=5, device=device, dependent=(3,))
    expected = gram_schmidt(**inputs, backend="triton")
    with guarded(inputs["V"], offset) as V, guarded(inputs["against"], offset) as P:
        result = gram_schmidt(V, P, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_small_matrices_take_one_launch(device):
    """Once or twice through a sweep, whatever the batch holds; one more launch, over at once, looks for hard ones."""
    easy = make_inputs((3,), 130, 5, device=device)["V"]
    skewed = easy[1:2] + 8 * easy[1:2, :, :1]
    for V in (easy, skewed, torch.cat([skewed, easy])):
        with launches() as names:
            result = gram_schmidt(V, backend="triton")
        assert names == ["small_kernel", "deflate_kernel"]
        assert_orthonormal(result, V, ranks=[5] * len(V))
    for d, r in ((60, 17), (1100, 16)):
        with launches() as names:
            gram_schmidt(make_inputs((1,), d, r, device=device)["V"], backend="triton")
        assert "small_kernel" not in names


def test_what_is_launched(device):
    """A handful of launches for all matrices of a shape, and nothing that ATen would multiply."""
    with launches() as names:
        gram_schmidt(make_inputs((5,), 41, 17, device=device)["V"], backend="triton")
    assert names == 2 * ["inner_kernel", "step_kernel", "combine_kernel"] + ["deflate_kernel"]
    inputs = make_inputs((5,), 41, 7, k=4, device=device)
    leaves = {k: t.requires_grad_() for k, t in inputs.items()}
    with launches() as names:
        result = gram_schmidt(**leaves, backend="triton")
    assert names == 2 * ["inner_kernel", "inner_kernel", "step_kernel", "combine_kernel"] + ["deflate_kernel"]
    with launches() as names:
        torch.autograd.grad(result.Q.sum() + result.R.sum(), list(leaves.values()))
    assert set(names) == {"inner_kernel", "inner_sums_kernel", "solve_kernel", "combine_kernel"} and len(names) <= 11


def test_a_list_and_a_basis(device):
    shapes = [(2, 30, 5, 3), (1, 41, 6, 0), (2, 30, 5, 3)]
    samples = [make_inputs((B,), d, r, k=k, device=device, seed=d) for B, d, r, k in shapes]
    Vs, bases = [s["V"] for s in samples], [s.get("against") for s in samples]
    for V, P, result in zip(Vs, bases, gram_schmidt_foreach(Vs, bases, backend="triton"), strict=True):
        assert_orthonormal(result, V, P, ranks=[V.shape[2]] * len(V))
        assert all(torch.equal(a, b) for a, b in zip(result, gram_schmidt(V, P, backend="triton"), strict=True))
    V = make_inputs((), 30, 6, device=device, dependent=(1, 4))["V"]
    basis = orthonormal_basis(V, trim=True, backend="triton")
    assert basis.Q.shape == (30, 4) and basis.rank == 4
    with pytest.raises(torch.linalg.LinAlgError, match="V: got a matrix with 4 independent columns"):
        gram_schmidt(V, deficient="raise", backend="triton")


def test_every_subset_of_needs(device):
    inputs = make_inputs((2,), 30, 5, k=4, device=device, dependent=(2,))
    dQ, dR = gradients_for(inputs)
    _, both = evaluate(inputs, dQ, dR, backend="triton")
    for name in inputs:
        leaves = {k: t.detach().requires_grad_(k == name) for k, t in inputs.items()}
        result = gram_schmidt(**leaves, backend="triton")
        (grad,) = torch.autograd.grad((result.Q, result.R), leaves[name], (dQ, dR))
        assert torch.equal(grad, both[name])


def test_what_it_cannot_run_and_what_it_says(device):
    V = torch.randn(9, 3, device=device)
    with pytest.raises(ValueError, match=r"backend='triton' cannot run gram_schmidt: .*fp64"):
        gram_schmidt(V.double(), backend="triton")
    assert "named by the caller" in str(explain(gram_schmidt, V, backend="triton"))
    chosen = explain(gram_schmidt, V)
    assert (chosen.backend == "triton") == V.is_cuda and "named" not in chosen.reason
    double = explain(gram_schmidt, V.double())
    assert double.backend == "aten" and ("fp64" in double.reason) == V.is_cuda
    assert next(b for b in info().backends["gram_schmidt"] if b.name == "triton").available
