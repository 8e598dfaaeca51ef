"""Data parallel: models with adapted layers under DDP and FSDP2 are what they are in one process."""

from __future__ import annotations

import pytest
from parallel_models import assert_trained_alike, by_block, local_loss, model, trained, trained_alone
from processes import run_in
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

OPTIONS = {
    "plain": {"routing": False},
    "all of it learns, with dropout that backward draws again": {
        "frozen_routing": True,
        "frozen": False,
        "dropout_p": 0.3,
        "recompute": True,
    },
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


def made(way, wrap):
    """Of a 0-dim parameter, as a scaling that learns is, FSDP2 takes none."""
    return model(**OPTIONS[way], learn_scaling=wrap is ddp)


def train_in_every_way(wrap):
    return {way: trained(wrap(made(way, wrap)), local_loss) for way in OPTIONS}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("wrap", [ddp, by_block, by_layer, kept_whole])
def test_as_in_one_process(wrap, ranks) -> None:
    """Outputs through their losses, gradients and ten steps of the optimizer; each rank has another sequence length."""
    found = run_in(ranks, train_in_every_way, wrap)
    for way in OPTIONS:
        assert_trained_alike([result[way] for result in found], trained_alone(made(way, wrap), ranks))
