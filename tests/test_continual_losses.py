"""Losses and their linear algebra: gradients proved in fp64, closed forms, edge cases."""

from __future__ import annotations

import pytest
import torch

from clora_kernels.continual import (
    absolute_overlap,
    leading_left_singular_vectors,
    low_rank_norm,
    routing_orthogonality,
)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("c", [1, 3, 4])
def test_routing_orthogonality_and_its_gradient(lead: tuple[int, ...], c: int) -> None:
    R, Q = normal(*lead, 4, 4).requires_grad_(), normal(*lead, 4, c)
    loss = routing_orthogonality(R, Q)
    by_hand = sum(
        float(Q_i[:, j] @ R_i[:, k]) ** 2
        for Q_i, R_i in zip(Q.reshape(-1, 4, c), R.detach().reshape(-1, 4, 4), strict=True)
        for j in range(c)
        for k in range(4)
    )
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)
    (dR,) = torch.autograd.grad(loss, R)
    torch.testing.assert_close(dR, 2 * Q @ Q.mT @ R.detach())
    assert torch.autograd.gradcheck(routing_orthogonality, (R, Q))
    assert torch.autograd.gradgradcheck(routing_orthogonality, (R, Q))


def test_routing_orthogonality_sees_the_output_side_of_the_basis_only() -> None:
    Q = torch.eye(4)[:, :1]
    inside, outside = torch.zeros(4, 4), torch.zeros(4, 4)
    inside[0, 3], outside[3, 0] = 2.0, 2.0
    assert routing_orthogonality(inside, Q) == 4 and routing_orthogonality(outside, Q) == 0


@pytest.mark.parametrize("shape", [(3, 2), (2, 4, 2), (1, 4, 2)])
def test_a_basis_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="basis: got shape"):
        routing_orthogonality(torch.zeros(3, 4, 4), torch.zeros(shape))


def test_absolute_overlap_and_its_gradient() -> None:
    B, old = normal(6, 2).requires_grad_(), normal(6, 5)
    loss = absolute_overlap(B, old)
    assert loss.item() == pytest.approx(sum(abs(float(b @ o)) for b in B.detach().T for o in old.T), rel=1e-12)
    (dB,) = torch.autograd.grad(loss, B)
    torch.testing.assert_close(dB, old @ torch.sign(B.detach().mT @ old).mT)
    assert (B.mT @ old).abs().min() > 1e-3  # away from where it bends
    assert torch.autograd.gradcheck(absolute_overlap, (B, old.requires_grad_()))


def test_absolute_overlap_of_what_is_orthogonal_or_zero_has_the_gradient_zero() -> None:
    B, old = torch.zeros(4, 3), torch.eye(4)[:, :2].contiguous()
    B[2, 0], B[0, 2] = 5.0, -2.0
    loss = absolute_overlap(B.requires_grad_(), old)
    loss.backward()
    assert loss == 2 and B.grad[:, :2].eq(0).all() and B.grad[:, 2].tolist() == [-1, 0, 0, 0]


@pytest.mark.parametrize("shapes", [((4, 2), (3, 2)), ((4,), (4, 2)), ((4, 2), (4,))], ids=str)
def test_columns_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="old: got shape"):
        absolute_overlap(*map(torch.zeros, shapes))


def test_leading_vectors_are_the_fewest_that_hold_the_energy() -> None:
    left, right = torch.linalg.qr(normal(4, 4)).Q, torch.linalg.qr(normal(4, 4)).Q
    # Shares of the squared norm: 0.64, 0.27, 0.09, 0.
    sigma = torch.tensor([0.64, 0.27, 0.09, 0.0], dtype=torch.float64).sqrt()
    R = left * sigma @ right.mT
    for energy, rank in ((0.0, 0), (0.5, 1), (0.63, 1), (0.65, 2), (0.9, 2), (0.92, 3), (1.0, 3)):
        Q = leading_left_singular_vectors(R, energy)
        assert int(Q.any(0).sum()) == rank, energy
        torch.testing.assert_close(Q @ Q.mT, left[:, :rank] @ left[:, :rank].mT)
    assert (leading_left_singular_vectors(R, 0.9)[:, 2:] == 0).all()


def test_leading_vectors_of_a_batch_of_zero_and_of_fp32() -> None:
    R = torch.stack([torch.zeros(4, 4), torch.eye(4), 1e-12 * torch.ones(4, 4)])
    Q = leading_left_singular_vectors(R, 1.0)
    assert Q.dtype == torch.float32 and Q.shape == R.shape
    assert [int(q.any(0).sum()) for q in Q] == [0, 4, 1]
    with pytest.raises(ValueError, match=r"energy: got 1\.5"):
        leading_left_singular_vectors(R, 1.5)


def test_low_rank_norm_is_the_norm_of_the_product() -> None:
    left, right = normal(9, 3), normal(7, 3)
    torch.testing.assert_close(low_rank_norm(left, right), torch.linalg.matrix_norm(left @ right.mT))
    torch.testing.assert_close(low_rank_norm(left[:2], right), torch.linalg.matrix_norm(left[:2] @ right.mT))


def test_low_rank_norm_keeps_the_digits_of_a_small_difference() -> None:
    A, B, step = normal(50, 4), normal(40, 4), 1e-9 * normal(50, 4)
    norm = low_rank_norm(torch.cat([A, A + step], 1), torch.cat([B, -B], 1))
    assert float(norm / low_rank_norm(step, B)) == pytest.approx(1, abs=1e-5)


def test_full_energy_takes_the_rank_and_no_rounding():
    matrix = torch.randn(8, 3) @ torch.randn(3, 8)
    assert (leading_left_singular_vectors(matrix, 1.0).norm(dim=0) > 0).sum() == 3
