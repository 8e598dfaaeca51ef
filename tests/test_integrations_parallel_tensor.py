"""Tensor parallel: plans cut layers into parts, and the parts together are the layer."""

from __future__ import annotations

import functools

import pytest
import torch
from parallel_models import (
    assert_trained_alike,
    batch,
    loss_of,
    mesh_of_all,
    model,
    tensor_parallel,
    trained,
    trained_alone,
    whole,
)
from processes import run_in
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from clora_kernels.integrations.parallel import ColumnParallel, RowParallel

OPTIONS = {
    "plain without bias": {"routing": False, "bias": False},
    "two routings, and all of it learns": {"frozen_routing": True, "frozen": False, "learn_scaling": True},
}


def same_batch(module, step):
    return loss_of(module, *batch(0, step))


def train_in_every_way():
    found = {}
    for way, options in OPTIONS.items():
        module = tensor_parallel(model(**options))
        assert [*module.state_dict()] == [*model(**options).state_dict()]
        told = repr(module[0].up)
        assert f"path={'aten' if 'frozen' in options else 'composite'}" in told
        assert told.startswith("ColumnParallelLayer(in_features=8, ")
        found[way] = trained(module, same_batch)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_trained_as_in_one_process(ranks) -> None:
    """The loss, gradients and ten steps, up and down projections together; each rank has the same batch."""
    found = run_in(ranks, train_in_every_way)
    for way, options in OPTIONS.items():
        expected = trained_alone(model(**options), 1)
        for result in found:
            assert_trained_alike([result[way]], expected)


def data_and_tensor_parallel():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    module = tensor_parallel(model(frozen_routing=True), mesh["tp"])
    for block in module:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(module, mesh=mesh["dp"])
    rank = mesh["dp"].get_local_rank()
    result = trained(module, lambda module, step: loss_of(module, *batch(rank, step)))
    return (rank, mesh["tp"].get_local_rank()), result


def test_under_fsdp_with_sequences_of_different_lengths() -> None:
    expected = trained_alone(model(frozen_routing=True), 2)
    found = dict(run_in(4, data_and_tensor_parallel))
    for tp in (0, 1):
        assert_trained_alike([found[dp, tp] for dp in (0, 1)], expected)


def along_the_sequence():
    """What lies around the two layers is cut along the sequence, as norms are."""
    mesh, module = mesh_of_all(), model(frozen=False)
    tensor_parallel(
        module,
        mesh,
        up=functools.partial(ColumnParallel, input_layouts=Shard(1)),
        down=functools.partial(RowParallel, output_layouts=Shard(1)),
    )
    x, wanted = (t.repeat(1, 4, 1).chunk(mesh.size(), 1)[mesh.get_local_rank()] for t in batch(0, 0))
    loss = loss_of(module, x, wanted) / mesh.size()
    loss.backward()
    return loss.detach(), {name: whole(p.grad) for name, p in module.named_parameters()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_x_and_y_in_parts_along_the_sequence(ranks) -> None:
    module = model(frozen=False)
    loss = loss_of(module, *(t.repeat(1, 4, 1) for t in batch(0, 0)))
    loss.backward()
    found = run_in(ranks, along_the_sequence)
    torch.testing.assert_close(sum(part for part, _ in found), loss.detach())
    for _, gradients in found:
        torch.testing.assert_close(gradients, {name: p.grad for name, p in module.named_parameters()})
