"""The gates of orthogonality notice what they must, and the zoo holds what its names say."""

from __future__ import annotations

import pytest
import torch

from clora_kernels.reference.gram_schmidt import GramSchmidtResult
from clora_kernels.testing import assert_orthonormal, hard_matrices, mixed_batch, orthogonality

D, RANK, K = 40, 6, 5


def sound(dependent: int | None = None):
    """V, P and an exact result in fp64, rounded to fp32; column ``dependent`` is twice the one before it."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(D, K + RANK, generator=generator, dtype=torch.float64)).Q
    P, Q = basis[:, :K], basis[:, K:].clone()
    R = torch.randn(RANK, RANK, generator=generator, dtype=torch.float64).triu(1) + 2 * torch.eye(RANK)
    R[:, -1] *= 1e-6  # a small column, whose error must not hide behind those of the others
    inside = torch.randn(K, RANK, generator=generator, dtype=torch.float64) * R.norm(dim=0)
    if dependent is not None:
        R[:, dependent], inside[:, dependent] = 2 * R[:, dependent - 1], 2 * inside[:, dependent - 1]
        R[dependent] = 0
        Q[:, dependent] = 0
    V = P @ inside + Q @ R
    rank = torch.tensor(RANK if dependent is None else RANK - 1, dtype=torch.int32)
    return V, P, GramSchmidtResult(Q.float(), R.float(), rank)


def changed(result: GramSchmidtResult, name: str, place: tuple[int, int], by: float) -> GramSchmidtResult:
    t = getattr(result, name).clone()
    t[place] += by
    return result._replace(**{name: t})


@pytest.mark.parametrize("dependent", [None, 3])
def test_what_is_right_passes(dependent):
    V, P, result = sound(dependent)
    found = orthogonality(result, V, P, rank=int(result.rank))
    assert found.ok and found.leakage > 0 and found.orthogonality > 0
    assert_orthonormal(GramSchmidtResult(*(t[None] for t in result)), V[None], P, ranks=[int(result.rank)])


WRONG = [
    (None, "orthogonality", "Q", (7, 2), 1e-4),
    (None, "reconstruction", "R", (1, 4), 1e-4),
    (None, "reconstruction", "R", (5, 5), 1e-8),
    (None, "not upper triangular", "R", (4, 1), 1e-9),
    (None, "negative element", "R", (2, 2), -4.0),
    (3, "expected the rank, 5", "R", (2, 2), -2.0),
    (3, "row of R", "R", (3, 5), 1e-9),
    (3, "column of Q", "Q", (0, 3), 1e-9),
    (None, "not finite", "R", (0, 1), torch.nan),
]


@pytest.mark.parametrize(("dependent", "message", "name", "place", "by"), WRONG)
def test_what_is_wrong_does_not(dependent, message, name, place, by):
    V, P, result = sound(dependent)
    if message == "expected the rank, 5":
        result = changed(result._replace(Q=result.Q * (torch.arange(RANK) != 2)), "R", (2, 2), 0)
        R = result.R.clone()
        R[2] = 0
        found = orthogonality(result._replace(R=R), V, P)
    else:
        found = orthogonality(changed(result, name, place, by), V, P)
    assert not found.ok
    assert message in str(found) or getattr(found, message, 0) > 1


def test_what_is_not_orthogonal_does_not_pass_for_being_a_reconstruction():
    V, P, result = sound()
    slanted = torch.eye(RANK, dtype=torch.float64)
    slanted[0, 3] = 1e-4
    Q, R = result.Q.double() @ slanted, torch.linalg.inv(slanted) @ result.R.double()
    found = orthogonality(result._replace(Q=Q.float(), R=R.float()), V, P)
    assert found.orthogonality > 1 > max(found.reconstruction, found.leakage) and not found.ok


def test_what_leaks_does_not_pass():
    V, P, result = sound()
    leaking = result.Q.double() + 1e-5 * P @ torch.randn(K, RANK, dtype=torch.float64)
    leaking = torch.linalg.qr(leaking).Q * torch.linalg.qr(leaking).R.diagonal().sign()
    found = orthogonality(result._replace(Q=leaking.float()), V, P)
    assert found.leakage > 1 and found.orthogonality < 1 and not found.ok
    assert orthogonality(result._replace(Q=leaking.float()), V, None).leakage == 0


def test_a_reconstruction_is_one_with_the_basis():
    V, P, result = sound()
    assert orthogonality(result, V, P).reconstruction < 1 < orthogonality(result, V).reconstruction


def test_rank_and_NaN_are_read():
    V, P, result = sound()
    assert "got rank 6, expected 5" in str(orthogonality(result, V, P, rank=5))
    lost = result._replace(rank=torch.tensor(-1, dtype=torch.int32))
    assert "holds numbers" in str(orthogonality(lost, V, P, rank=-1))
    nothing = GramSchmidtResult(*(torch.full_like(t, torch.nan) for t in result[:2]), lost.rank)
    assert orthogonality(nothing, V, P, rank=-1).ok


def test_every_matrix_that_fails_is_named():
    V, P, result = sound()
    wrong = changed(result, "Q", (7, 2), 1e-3)
    batch = GramSchmidtResult(*(torch.stack([a, b]) for a, b in zip(result, wrong, strict=True)))
    with pytest.raises(AssertionError, match="matrix 1: orthogonality") as caught:
        assert_orthonormal(batch, torch.stack([V, V]), P)
    assert "matrix 0" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_zoo_is_what_it_says(dtype):
    for matrix in hard_matrices(67, 12, dtype=dtype):
        assert matrix.V.shape == (67, 12) and matrix.V.dtype == dtype
        if matrix.name in ("nan", "inf"):
            assert matrix.rank == -1 and not matrix.V.isfinite().all()
            continue
        assert matrix.V.isfinite().all()
        if matrix.rank is not None:
            V = matrix.V.double()
            norms = V.norm(dim=0)
            V = V / torch.where(norms > 0, norms, 1.0)
            assert int(torch.linalg.matrix_rank(V, rtol=1e-6)) == matrix.rank, matrix.name
    names = [m.name for m in hard_matrices(67, 12, dtype=dtype)]
    assert len(set(names)) == len(names)
    V, matrices = mixed_batch(hard_matrices(67, 12, dtype=dtype), easy=4)
    assert len(V) == len(matrices) == len(names) + 4 and sum(m.name == "easy" for m in matrices) == 4
    for stacked, matrix in zip(V, matrices, strict=True):
        assert torch.equal(stacked.nan_to_num(7.0), matrix.V.nan_to_num(7.0))


@pytest.mark.parametrize(("d", "r"), [(9, 3), (4, 4), (3, 5)])
def test_the_zoo_needs_room(d, r):
    with pytest.raises(ValueError, match=f"d, r: got {d}, {r}, expected r >= 4 and d > r"):
        hard_matrices(d, r)
