"""Gram-Schmidt of rows on several ranks: what one process computes, and the same R and rank on all of them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import run_in
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

from clora_kernels import RoutedLoRALinear, gram_schmidt
from clora_kernels.integrations.parallel import RowParallel, gram_schmidt_sharded
from clora_kernels.testing import assert_orthonormal
from clora_kernels.testing.zoo import hard_matrices

D = 67
CUTS = {2: [23, 44], 4: [9, 0, 41, 17]}  # rows by rank, of one of four none


def mine(t):
    return t.split(CUTS[dist.get_world_size()], -2)[dist.get_rank()]


def problem(dtype, r=5, k=0, lead=(2, 3)):
    generator = torch.Generator().manual_seed(r + k)
    V = torch.randn(*lead, D, r, generator=generator, dtype=torch.float64)
    P = torch.linalg.qr(torch.randn(lead[-1] if lead else 1, D, k, generator=generator, dtype=torch.float64)).Q
    V = V.to(dtype)
    return V, (P if lead else P[0]) if k else None


def joined(results):
    """Q of all rows, R and rank, which are the same bits on every rank."""
    for _, R, rank in results:
        torch.testing.assert_close(R, results[0][1], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(rank, results[0][2])
    return torch.cat([Q for Q, _, _ in results], -2), *results[0][1:]


PROBLEMS = [
    (dtype, r, k, lead)
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    for r, k, lead in ((1, 0, ()), (5, 0, (2, 3)), (24, 7, (2, 3)), (20, 30, ()))
]


def solve_all():
    found = []
    for dtype, r, k, lead in PROBLEMS:
        V, P = problem(dtype, r, k, lead)
        found.append(tuple(gram_schmidt_sharded(mine(V), None if P is None else mine(P))))
        again = gram_schmidt_sharded(mine(V), None if P is None else mine(P))
        assert all(torch.equal(a, b) for a, b in zip(found[-1], again, strict=True))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_one_process_and_several(ranks) -> None:
    for (dtype, r, k, lead), *results in zip(PROBLEMS, *run_in(ranks, solve_all), strict=True):
        V, P = problem(dtype, r, k, lead)
        expected = gram_schmidt(V, P, backend="aten")
        Q, R, rank = joined(results)
        assert (Q.dtype, R.dtype, Q.shape) == (expected.Q.dtype, expected.R.dtype, expected.Q.shape)
        torch.testing.assert_close(Q, expected.Q)
        torch.testing.assert_close(R, expected.R)
        assert torch.equal(rank, expected.rank)


def solve_the_zoo(dtype, r, beside):
    V, P = the_zoo(dtype, r, beside)
    return tuple(gram_schmidt_sharded(mine(V), None if P is None else mine(P)))


def the_zoo(dtype, r, beside):
    V = torch.stack([m.V for m in hard_matrices(D, r, dtype=dtype)])
    return V, problem(torch.float64, r, 3, (1,))[1] if beside else None


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a basis"])
@pytest.mark.parametrize("r", [4, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_hard_matrices(dtype, r, beside, ranks) -> None:
    """All of the zoo in one batch passes its gates, and every rank is that of one process."""
    V, P = the_zoo(dtype, r, beside)
    Q, R, rank = joined(run_in(ranks, solve_the_zoo, dtype, r, beside))
    expected = gram_schmidt(V, P, backend="aten")
    assert torch.equal(rank, expected.rank)
    assert_orthonormal(type(expected)(Q, R, rank), V, P)


def differentiate(way):
    V, P = differentiable(way)
    V_mine, P_mine = mine(V).requires_grad_(), None if P is None else mine(P).requires_grad_()
    Q, R, _ = gram_schmidt_sharded(V_mine, P_mine)
    loss = (Q * mine(weights(V.shape, 1))).sum() + (R * weights(R.shape, 2)).sum()
    inputs = [V_mine] if P is None else [V_mine, P_mine]
    return torch.autograd.grad(loss, inputs)


def weights(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differentiable(way):
    V, P = problem(torch.float64, 6, 0 if way == "alone" else 4, (3,))
    if way == "deficient":
        V[1, :, 3] = V[1, :, 1] * 2 - V[1, :, 0]
        V[2, :, 0] = 0
    return V, P


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("way", ["alone", "beside a basis", "deficient"])
def test_gradients(way, ranks) -> None:
    V, P = differentiable(way)
    inputs = [t.requires_grad_() for t in (V, P) if t is not None]
    Q, R, _ = gram_schmidt(V, P, backend="reference")
    loss = (Q * weights(V.shape, 1)).sum() + (R * weights(R.shape, 2)).sum()
    expected = torch.autograd.grad(loss, inputs)
    found = run_in(ranks, differentiate, way)
    for i, gradient in enumerate(expected):
        torch.testing.assert_close(torch.cat([gradients[i] for gradients in found], -2), gradient)


def counted(d, k):
    """Numbers that a call and its backward send, by the function that sends them."""
    sent, all_reduce = [], dist.all_reduce

    def counting(t, *args, **kwargs):
        sent.append(t.numel())
        return all_reduce(t, *args, **kwargs)

    generator = torch.Generator().manual_seed(dist.get_rank())
    V = torch.randn(2, d, 5, generator=generator, requires_grad=True)
    start = torch.linalg.qr(torch.randn(2, d * dist.get_world_size(), k, generator=torch.Generator().manual_seed(9))).Q
    P = start.chunk(dist.get_world_size(), 1)[dist.get_rank()].requires_grad_() if k else None
    others = {name: None for name in ("all_gather", "all_gather_into_tensor", "broadcast", "send", "reduce_scatter")}
    with mock.patch.multiple(dist, all_reduce=counting, **others):
        gram_schmidt_sharded(V, P).Q.sum().backward()
    return sum(sent)


def traffic():
    return [[counted(d, k) for d in (40, 400)] for k in (0, 3)]


def test_gram_matrices_are_sent_and_no_factor() -> None:
    """VᵀV forward and QᵀdQ backward, beside a basis PᵀV in both and PᵀdQ, however long the columns are."""
    for found in run_in(2, traffic):
        assert found == [[2 * 2 * 5 * 5] * 2, [2 * (2 * 5 * 5 + 3 * 3 * 5)] * 2]


def of_a_layer():
    """lora_A of a row-parallel layer, as its docstring says."""
    mesh, layer = init_device_mesh("cpu", (dist.get_world_size(),)), row_parallel_layer()
    parallelize_module(layer, mesh, RowParallel())
    return gram_schmidt_sharded(layer.lora_A.to_local().mT, group=mesh.get_group()).Q


def row_parallel_layer():
    torch.manual_seed(0)
    return RoutedLoRALinear(12, 5, 3, dtype=torch.float64)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_factor_of_a_row_parallel_layer(ranks) -> None:
    expected = gram_schmidt(row_parallel_layer().lora_A.mT).Q
    torch.testing.assert_close(torch.cat(run_in(ranks, of_a_layer)), expected)


def refusals():
    V = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"V_local: got shape \(4,\)"):
        gram_schmidt_sharded(V[0])
    with pytest.raises(ValueError, match=r"against_local: got shape \(2, 4\), expected \[..., 3, k\]"):
        gram_schmidt_sharded(V, V[:2])
    with pytest.raises(ValueError, match="rank_tol: got 2"):
        gram_schmidt_sharded(V, rank_tol=2)
    parted = DTensor.from_local(V, init_device_mesh("cpu", (2,)), [Shard(0)])
    with pytest.raises(TypeError, match=r"V_local: got a DTensor, expected the rows of this rank: V_local\.to_local"):
        gram_schmidt_sharded(parted)
    with pytest.raises(TypeError, match="against_local: got a DTensor"):
        gram_schmidt_sharded(torch.randn(6, 4), parted)
    first = dist.new_group([0])
    if dist.get_rank():
        with pytest.raises(ValueError, match="group: got one without this rank"):
            gram_schmidt_sharded(V, group=first)
    empty = gram_schmidt_sharded(V[:, :0])
    assert empty.Q.shape == (3, 0) and empty.R.shape == (0, 0) and empty.rank == 0
    assert gram_schmidt_sharded(V[:0]).rank == 0, "no rank has a row"
    V = torch.randn(3, 2, requires_grad=True)
    gradient = torch.autograd.grad(gram_schmidt_sharded(V).Q.sum(), V, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="gram_schmidt_sharded: double backward is not supported"):
        gradient.sum().backward()


def only_one_of_two():
    """A group of its own: the other rank has no part in it."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    V = torch.randn(20, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    return V, tuple(gram_schmidt_sharded(V, group=groups[dist.get_rank()]))


def test_groups() -> None:
    for V, result in run_in(2, only_one_of_two):
        for mine_, alone in zip(result, gram_schmidt(V, backend="aten"), strict=True):
            assert torch.equal(mine_, alone)


def test_refusals() -> None:
    run_in(2, refusals)
    with pytest.raises(RuntimeError, match="group: got no process group"):
        gram_schmidt_sharded(torch.randn(3, 2))
