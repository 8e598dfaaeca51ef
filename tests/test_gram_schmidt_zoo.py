"""The zoo of hard matrices, one by one and in mixed batches; scales, repeatability, independence of the batch."""

from __future__ import annotations

import pytest
import torch
from orthonormal import CASES, TYPES, backends, gradients_for

from clora_kernels import gram_schmidt
from clora_kernels.kernels.gram_schmidt import aten
from clora_kernels.kernels.gram_schmidt.algebra import AGAIN, Columns
from clora_kernels.reference.gram_schmidt import GramSchmidtResult, tolerance
from clora_kernels.reference.gram_schmidt_samples import make_inputs
from clora_kernels.testing import assert_orthonormal, hard_matrices, mixed_batch, orthogonality

SHAPES = [(41, 4), (67, 16), (300, 33)]
ALL = [*CASES, *((name, "reference") for name in TYPES)]
ANIMALS = [m.name for m in hard_matrices(9, 4)]


def one(result: GramSchmidtResult, i: int) -> GramSchmidtResult:
    return GramSchmidtResult(*(t[i] for t in result))


@pytest.mark.parametrize(("dtype", "backend"), ALL)
@pytest.mark.parametrize("name", ANIMALS)
def test_alone(device, name, dtype, backend):
    for d, r in SHAPES:
        matrix = next(m for m in hard_matrices(d, r, dtype=TYPES[dtype], device=device) if m.name == name)
        found = orthogonality(gram_schmidt(matrix.V, backend=backend), matrix.V, rank=matrix.rank)
        assert found.ok, f"{d}x{r}: {found}"


@pytest.mark.parametrize(("dtype", "backend"), ALL)
@pytest.mark.parametrize("deficient", ["zero", "random"])
def test_in_mixed_batches(device, dtype, backend, deficient):
    for seed, (d, r) in enumerate(SHAPES):
        V, matrices = mixed_batch(hard_matrices(d, r, dtype=TYPES[dtype], device=device, seed=seed), seed=seed)
        result = gram_schmidt(V, backend=backend, deficient=deficient)
        assert_orthonormal(result, V, ranks=[m.rank for m in matrices], completed=deficient == "random")


@pytest.mark.parametrize(("dtype", "backend"), ALL)
def test_beside_a_basis(device, dtype, backend):
    """Leakage too: one basis for all of a mixed batch, and matrices that lie in it but for a little."""
    d, r, k = 300, 12, 20
    inputs = make_inputs((), d, r, k=k, device=device, dtype=torch.float64)
    P = inputs["against"] if dtype == "fp64" else inputs["against"].float()
    V, matrices = mixed_batch(hard_matrices(d, r, dtype=TYPES[dtype], device=device))
    result = gram_schmidt(V, P, backend=backend)
    assert_orthonormal(result, V, P, ranks=[-1 if m.rank == -1 else None for m in matrices])
    inside = P.double() @ torch.randn(k, r, dtype=torch.float64, device=device)
    outside = torch.randn(d, r, dtype=torch.float64, device=device)
    # what is left of a column is this much of it; in 16 bit rounding alone is more than the least
    shares = [1e-1, 1e-2, 1e-3, 1e-4] + ([3e-5] if TYPES[dtype].itemsize > 2 else [])
    V = torch.stack([inside + share * outside for share in shares]).to(TYPES[dtype])
    assert_orthonormal(gram_schmidt(V, P, backend=backend), V, P, ranks=[r] * len(shares))


@pytest.mark.parametrize(("dtype", "backend"), CASES)
def test_inside_a_basis_nothing_is_left(device, dtype, backend):
    P = torch.eye(40, device=device, dtype=torch.float64)[:, 3:11].to(TYPES[dtype])
    V = P @ torch.randint(-3, 4, (8, 5), device=device).to(TYPES[dtype])
    result = gram_schmidt(V, P, backend=backend)
    assert result.rank == 0 and not result.Q.any() and not result.R.any()
    completed = gram_schmidt(V, P, backend=backend, deficient="random")
    assert_orthonormal(completed, V, P, ranks=[0], completed=True)


@pytest.mark.parametrize(("dtype", "backend"), CASES)
def test_the_rank_does_not_depend_on_scale(device, dtype, backend):
    """A column is measured by its own norm; powers of two change no digit of anything."""
    inputs = make_inputs((), 50, 9, dtype=TYPES[dtype], device=device, dependent=(3, 6), noise=1e-2, rank_tol=1e-1)
    V, small = inputs["V"], TYPES[dtype] == torch.float16
    exponents = torch.arange(-4, 5, device=device) if small else 12 * torch.arange(-4, 5, device=device)
    expected = gram_schmidt(**inputs, backend=backend)
    assert expected.rank == 7
    scale = 2.0**exponents
    for factor in (1.0, 2.0**-3, 2.0**3) if small else (1.0, 2.0**-60, 2.0**60):
        result = gram_schmidt((V.double() * scale * factor).to(V.dtype), rank_tol=1e-1, backend=backend)
        assert result.rank == 7
        eps = torch.finfo(result.Q.dtype).eps
        assert (result.Q.double() - expected.Q.double()).abs().max() < 4 * eps
        whole = expected.R.double() * scale * factor
        assert ((result.R.double() - whole).abs() <= 8 * torch.finfo(result.R.dtype).eps * whole.norm(dim=0)).all()


@pytest.mark.parametrize(("dtype", "backend"), ALL)
def test_the_edge_of_the_tolerance(device, dtype, backend):
    """What is left of the second column is 2⁻⁶ of its norm, which is large against its elements."""
    share = 2.0**-6
    ones = torch.ones(64, dtype=torch.float64, device=device)
    V = torch.stack([ones, ones + share * torch.tensor([1.0, -1.0], dtype=ones.dtype, device=device).repeat(32)], -1)
    V = V.to(TYPES[dtype])
    left = share / (1 + share**2) ** 0.5
    for factor, rank in ((1.01, 1), (0.99, 2)):
        assert gram_schmidt(V, rank_tol=left * factor, backend=backend).rank == rank


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_second_sweep_is_enough(device, dtype, monkeypatch):
    """Of what one sweep leaves, and nothing is deflated; the columns are rounded once, at the end."""
    V = next(m.V for m in hard_matrices(300, 33, device=device) if m.name == "condition_1e2").to(TYPES[dtype])
    first = aten.step(*aten.gram(Columns(V[None], None)), tolerance(None, V.dtype), V.dtype)
    assert first.state.tolist() == [AGAIN]
    monkeypatch.setattr(aten, "any", lambda flags: bool(flags.any()))
    monkeypatch.setattr(aten, "deflate", None)
    Q = gram_schmidt(V, backend="aten").Q
    exact = gram_schmidt(V.double(), backend="reference").Q
    if dtype == "bf16":
        assert (Q == exact.to(Q.dtype)).float().mean() > 0.99
    else:
        assert (Q.double() - exact).abs().max() < 1e-5


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(("d", "r"), [(4096, 1), (4096, 4), (4100, 12), (8192, 16), (4096, 40)])
def test_columns_of_one_magnitude(device, d, r, backend):
    """Sums of equal terms round the same way again and again: the worst that fp32 sums of squares can meet."""
    signs = torch.randint(0, 2, (d, r), generator=torch.Generator().manual_seed(d + r)).to(device) * 2.0 - 1
    sizes = torch.linspace(1, 2, 24, device=device)[:, None, None]  # some round worse than others
    V = sizes * torch.where(torch.arange(r, device=device) == 0, 1.0, signs)
    assert_orthonormal(gram_schmidt(V, backend=backend), V, ranks=[r] * 24)


def test_the_default_tolerance():
    assert tolerance(None, torch.float32) == tolerance(None, torch.bfloat16) == 64 * 2.0**-23
    assert tolerance(None, torch.float64) == 64 * 2.0**-52 and tolerance(0.5, torch.float16) == 0.5


@pytest.mark.parametrize(("dtype", "backend"), CASES)
def test_the_same_bits_every_time(device, dtype, backend):
    V, _ = mixed_batch(hard_matrices(67, 12, dtype=TYPES[dtype], device=device))
    inputs = {"V": V, "against": make_inputs((), 67, 1, k=5, device=device)["against"].to(torch.float32)}
    dQ, dR = gradients_for(inputs)
    first = [t.nan_to_num(7.0) for t in _everything(inputs, dQ, dR, backend)]
    for _ in range(3):
        again = [t.nan_to_num(7.0) for t in _everything(inputs, dQ, dR, backend)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def _everything(inputs, dQ, dR, backend):
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
    result = gram_schmidt(**leaves, backend=backend)
    return [*result, *torch.autograd.grad([result.Q, result.R], list(leaves.values()), [dQ, dR])]


@pytest.mark.parametrize(("dtype", "backend"), CASES)
def test_a_matrix_touches_no_other(device, dtype, backend):
    """Values and gradients of the sound matrices of a batch stay what they are when others are spoilt."""
    sound = make_inputs((6,), 67, 12, dtype=TYPES[dtype], device=device)["V"]
    hard = [m.V for m in hard_matrices(67, 12, dtype=TYPES[dtype], device=device)]
    mixed = torch.stack([sound[0], *hard[:9], *sound[1:4], *hard[9:], *sound[4:]])
    places = [0, 10, 11, 12, len(mixed) - 2, len(mixed) - 1]
    dQ, dR = gradients_for({"V": mixed})
    alone = _everything({"V": sound}, dQ[places], dR[places], backend)
    beside = _everything({"V": mixed}, dQ, dR, backend)
    for a, b in zip(alone, beside, strict=True):
        eps = 0 if backend == "native" or a.dtype == torch.int32 else 4 * torch.finfo(a.dtype).eps
        assert ((a - b[places]).abs() <= eps * a.abs().amax()).all()
    assert beside[2].tolist().count(-1) == 2 and beside[-1].isnan().flatten(1).any(1).sum() == 2
