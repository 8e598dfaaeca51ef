"""Data parallel: models with adapted layers under DDP and FSDP2 are what they are in one process."""

from __future__ import annotations

import functools

import pytest
from parallel_models import assert_trained_alike, by_block, local_loss, model, trained, trained_alone
from processes import run_in
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

OPTIONS = {
    "plain": {"routing": False},
    "two routings, and all of it learns": {"frozen_routing": True, "frozen": False},
    "dropout that backward draws again": {"dropout_p": 0.3, "recompute": True},
    "a scaling that learns": {"learn_scaling": True},
}


def ddp(module):
    return DistributedDataParallel(module)


def by_layer(module):
    for block in module:
        fully_shard(block.up)
        fully_shard(block.down)
    return by_block(module)


def kept_whole(module):
    """Of a base that fits on each rank only what learns is sharded."""
    ignored = {p for p in module.parameters() if not p.requires_grad}
    return by_block(module, ignored_params=ignored)


def ways(wrap):
    """Of a 0-dim parameter FSDP2 takes none."""
    return [way for way in OPTIONS if wrap is ddp or way != "a scaling that learns"]


def train_in_every_way(wrap):
    return {way: trained(wrap(model(**OPTIONS[way])), local_loss) for way in ways(wrap)}


@functools.cache
def alone(way, ranks):
    return trained_alone(model(**OPTIONS[way]), ranks)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("wrap", [ddp, by_block, by_layer, kept_whole])
def test_as_in_one_process(wrap, ranks) -> None:
    """Outputs through their losses, gradients and ten steps of the optimizer; each rank has another sequence length."""
    found = run_in(ranks, train_in_every_way, wrap)
    for way in ways(wrap):
        assert_trained_alike([result[way] for result in found], alone(way, ranks))
