"""What runs tests in several processes: a failure says where it was, ends in time, and leaves nothing behind."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from processes import run_in
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def summed():
    """What the ranks of a group have in common, through a mesh that is equal to that of the call before."""
    t = torch.arange(8.0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    total = distribute_tensor(t, mesh, [Shard(0)]).sum().full_tensor()
    return dist.get_rank(), dist.get_world_size(), total, torch.rand(()), torch.get_num_threads(), os.getpid()


def test_calls_of_any_number_of_ranks_in_the_same_processes() -> None:
    found = {}
    for ranks in (2, 4, 1, 4, 2):
        for rank, (mine, size, total, drawn, threads, pid) in enumerate(run_in(ranks, summed)):
            assert (mine, size, total, threads) == (rank, ranks, 28, 1)
            assert found.setdefault("drawn", drawn) == drawn, "one call draws on where another ended"
            assert found.setdefault(rank, pid) == pid
    assert len(found) == 5 and os.getpid() not in found.values()


def raises():
    if dist.get_rank() == 1:
        raise KeyError("only on one rank")
    dist.barrier()


def dies():
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def hangs_beside_another():
    if dist.get_rank() == 1:
        time.sleep(600)
    raise KeyError("only on one rank")


def hangs():
    time.sleep(600)


@pytest.mark.parametrize(
    ("ranks", "function", "said"),
    [
        (2, raises, r"rank 1: Traceback (.|\n)*in raises(.|\n)*KeyError: 'only on one rank'"),
        (2, dies, r"rank 1: ended with exit code 3"),
        (2, hangs_beside_another, r"rank 0: Traceback (.|\n)*rank 1: did not end; it is in\n(.|\n)*in hangs"),
        (1, hangs, r"rank 0: did not end; it is in\n(.|\n)*in hangs"),
    ],
    ids=["raises", "dies", "hangs beside another", "hangs"],
)
def test_a_rank_that_does_not_return(ranks, function, said) -> None:
    with pytest.raises(AssertionError, match=said):
        run_in(ranks, function, **({"timeout_s": 1.0} if ranks == 1 else {}))
    assert len(run_in(2, summed)) == 2, "others run after it"


def test_what_cannot_be_sent_or_returned() -> None:
    with pytest.raises(AssertionError, match=r"rank 0: Traceback (.|\n)*pickle"):
        run_in(1, returns_what_is_no_value)
    with pytest.raises(Exception, match="pickle"):
        run_in(1, lambda: None)
    assert len(run_in(1, summed)) == 1


def returns_what_is_no_value():
    return lambda: None
