"""Losses and their linear algebra: gradients proved in fp64, closed forms, edge cases."""

from __future__ import annotations

import math

import pytest
import torch

from clora_kernels.continual import (
    ago,
    block_weight_penalty,
    leading_left_singular_vectors,
    low_rank_norm,
    pairwise_overlap,
    routing_orthogonality,
    soft_cross_entropy,
)
from clora_kernels.continual.losses import relative_norm


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


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("c", [0, 1, 5])
def test_pairwise_overlap_and_its_gradient(lead: tuple[int, ...], c: int) -> None:
    A, old = normal(*lead, 2, 7).requires_grad_(), normal(*lead, c, 7).requires_grad_()
    loss = pairwise_overlap(A, old)
    rows = zip(A.detach().view(-1, 2, 7), old.detach().view(math.prod(lead), c, 7), strict=True)
    by_hand = sum(abs(float((a * b).sum())) for new_i, old_i in rows for a in new_i for b in old_i)
    assert loss.shape == () and loss.item() == pytest.approx(by_hand, rel=1e-12)
    dA, d_old = torch.autograd.grad(loss, (A, old))
    sign = (A @ old.mT).sign().detach()
    torch.testing.assert_close(dA, sign @ old.detach())
    torch.testing.assert_close(d_old, sign.mT @ A.detach())
    assert torch.autograd.gradcheck(pairwise_overlap, (A, old))


def test_rows_that_are_orthogonal_do_not_overlap_and_are_not_pushed() -> None:
    A, old = torch.eye(4)[:2].requires_grad_(), torch.eye(4)[2:]
    loss = pairwise_overlap(A, old)
    loss.backward()
    assert loss == 0 and not A.grad.any()


@pytest.mark.parametrize(("new", "old"), [((2, 5), (2, 4)), ((3, 2, 5), (2, 5)), ((3, 2, 5), (2, 2, 5))])
def test_rows_that_do_not_fit_are_refused(new: tuple[int, ...], old: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"old: got shape \(.*expected \[\.\.\., c, K\]"):
        pairwise_overlap(torch.zeros(new), torch.zeros(old))


@pytest.mark.parametrize("layers", [1, 3])
def test_ago_and_its_gradient(layers: int) -> None:
    """Layers of other sizes, and other numbers of experts."""
    new = [normal(4 + i, 2 + i).requires_grad_() for i in range(layers)]
    old = [normal(4 + i, 5 - i).requires_grad_() for i in range(layers)]
    loss = ago(new, old)
    by_hand = sum(
        abs(float((B[:, i] * B_old[:, j]).detach().sum())) / layers
        for B, B_old in zip(new, old, strict=True)
        for i in range(B.shape[1])
        for j in range(B_old.shape[1])
    )
    assert loss.shape == () and loss.item() == pytest.approx(by_hand, rel=1e-12)
    gradients = torch.autograd.grad(loss, [*new, *old])
    for B, B_old, dB, d_old in zip(new, old, gradients[:layers], gradients[layers:], strict=True):
        sign = (B_old.mT @ B).sign().detach()
        torch.testing.assert_close(dB, B_old.detach() @ sign / layers)
        torch.testing.assert_close(d_old, B.detach() @ sign.mT / layers)
    assert torch.autograd.gradcheck(lambda *B: ago(B[:layers], B[layers:]), (*new, *old))


def test_experts_that_are_zero_or_orthogonal_are_not_pushed() -> None:
    B = torch.stack([torch.zeros(4), torch.eye(4)[0]], 1).requires_grad_()
    loss = ago([B], [torch.eye(4)[:, 2:]])
    loss.backward()
    assert loss == 0 and not B.grad.any()


@pytest.mark.parametrize(("layers", "others"), [(0, 0), (2, 1), (1, 2)])
def test_layers_that_do_not_fit_are_refused(layers: int, others: int) -> None:
    with pytest.raises(ValueError, match=rf"old: got {others} layers, expected those of experts, {layers}"):
        ago(layers * [torch.ones(4, 2)], others * [torch.ones(4, 3)])
    with pytest.raises(ValueError, match="old: got shape"):
        ago([torch.ones(4, 2)], [torch.ones(5, 2)])


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


def test_a_change_is_relative_to_what_there_was_and_divergence_is_not_hidden() -> None:
    left, right, zero = normal(5, 2), normal(4, 2), torch.zeros(5, 2, dtype=torch.float64)
    change, whole = (left, 0.5 * right), (left, right)
    assert relative_norm([(change, whole), (change, whole)]) == pytest.approx(0.5, rel=1e-12)
    assert relative_norm([]) is None and relative_norm([(change, (zero, right))]) is None
    for lost in (left * math.nan, left * torch.tensor([1.0, math.nan])):
        assert math.isnan(relative_norm([(change, whole), ((lost, right), whole)]))
        assert math.isnan(relative_norm([(change, whole), (change, (lost, right))]))


def test_full_energy_takes_the_rank_and_no_rounding():
    matrix = torch.randn(8, 3) @ torch.randn(3, 8)
    assert (leading_left_singular_vectors(matrix, 1.0).norm(dim=0) > 0).sum() == 3


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.3])
def test_soft_cross_entropy_and_its_gradients(temperature: float) -> None:
    s, t = normal(5, 4).requires_grad_(), normal(5, 4).requires_grad_()
    loss = soft_cross_entropy(s, t, temperature)
    p_s, p_t = (torch.exp(z / temperature) for z in (s.detach(), t.detach()))
    p_s, p_t = p_s / p_s.sum(1, keepdim=True), p_t / p_t.sum(1, keepdim=True)
    g = -p_s.log()
    torch.testing.assert_close(loss.detach(), (p_t * g).sum() / 5)
    ds, dt = torch.autograd.grad(loss, (s, t))
    torch.testing.assert_close(ds, (p_s - p_t) / (5 * temperature))
    torch.testing.assert_close(dt, p_t * (g - (p_t * g).sum(1, keepdim=True)) / (5 * temperature))
    assert torch.autograd.gradcheck(lambda s, t: soft_cross_entropy(s, t, temperature), (s, t))
    assert torch.autograd.gradgradcheck(lambda s, t: soft_cross_entropy(s, t, temperature), (s, t))


def test_soft_cross_entropy_of_many_dimensions_and_of_large_logits() -> None:
    s, t = normal(2, 3, 4), normal(2, 3, 4)
    torch.testing.assert_close(soft_cross_entropy(s, t), soft_cross_entropy(s.reshape(6, 4), t.reshape(6, 4)))
    assert soft_cross_entropy(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])) == 1e4
    with pytest.raises(ValueError, match=r"target_logits: got shape \(5, 3\), expected \(5, 4\)"):
        soft_cross_entropy(torch.zeros(5, 4), torch.zeros(5, 3))


@pytest.mark.parametrize("tasks", [1, 3])
def test_block_weight_penalty_and_its_gradient(tasks: int) -> None:
    mu, old = normal(6).requires_grad_(), normal(tasks, 6).requires_grad_()
    loss = block_weight_penalty(mu, old)
    m, expected, gradient = mu.detach(), torch.zeros((), dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for o in old.detach():
        c = (m @ o) / (m.norm() * o.norm())
        expected += c.abs() / tasks
        gradient += c.sign() * (o / (m.norm() * o.norm()) - c * m / m.norm() ** 2) / tasks
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(torch.autograd.grad(loss, mu)[0], gradient)
    assert torch.autograd.gradcheck(block_weight_penalty, (mu, old))
    assert torch.autograd.gradgradcheck(block_weight_penalty, (mu, old))


@pytest.mark.parametrize("mu", [[0.0, 2.0], [0.0, 0.0]], ids=["at right angles", "zero"])
def test_block_weights_without_a_cosine_have_no_gradient(mu: list[float]) -> None:
    weights = torch.tensor(mu, requires_grad=True)
    loss = block_weight_penalty(weights, torch.tensor([[3.0, 0.0]]))
    loss.backward()
    assert loss == 0 and torch.equal(weights.grad, torch.zeros(2))


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3), (1, 2, 4)])
def test_block_weights_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="old: got shape"):
        block_weight_penalty(torch.ones(4), torch.ones(shape))
    with pytest.raises(ValueError, match="old: got shape"):
        block_weight_penalty(torch.ones(1, 4), torch.ones(1, 1, 4))
