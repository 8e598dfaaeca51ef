"""Runs functions in processes that stay: four workers start once, and each call makes some of them one gloo group.

What takes seconds, starting Python and importing torch, happens once a session; a group takes milliseconds and is new
for every call, so that nothing of one call is left for the next.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

MOST = 4
TIMEOUT_S = 120.0
"""Of a collective that waits for another rank; a function that takes longer is ended too."""
GRACE_S = 2.0
"""What is left to the other ranks once one has failed."""

# Forked off one process that has imported what takes seconds to import, and has no threads yet.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "torch",
        "torch._dynamo",  # which FSDP2 imports on its first use
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.distributed.tensor.debug",
        "clora_kernels.integrations.parallel",
        "clora_kernels.integrations.peft.layers",
        "clora_kernels.integrations.peft.routed_lora",
        "clora_kernels.testing",
    ]
)


@dataclass
class _Worker:
    process: Any
    connection: Connection
    log: Path


class _Pool:
    """Four processes, of which the first n are the ranks of a call; one that failed is done with."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="processes-"))
        self.workers = [self._started(self.folder / f"log.{i}") for i in range(MOST)]
        self.calls = 0

    def _started(self, log: Path) -> _Worker:
        here, there = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_serve, args=(there, str(log)), daemon=True)
        process.start()
        there.close()  # else the end of a worker would not end the connection
        return _Worker(process, here, log)

    def run(self, processes: int, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        import torch

        self.calls += 1
        ranks = self.workers[:processes]
        store = f"{self.folder}/store.{self.calls}"
        calls = [pickle.dumps(((store, rank, processes, timeout_s), function, args)) for rank in range(processes)]
        try:
            for worker, call in zip(ranks, calls, strict=True):
                worker.connection.send_bytes(call)
            said, failed = self._answers(ranks, timeout_s)
            assert not failed, "\n\n".join(failed)
        except BaseException:
            end_workers()  # whatever one of them still does or says, the next call must not hear of it
            raise
        return [torch.load(io.BytesIO(said[rank]), weights_only=False) for rank in range(processes)]

    def _answers(self, ranks: list[_Worker], timeout_s: float) -> tuple[dict[int, bytes], list[str]]:
        """What each rank returned, and what is to be said of those that did not, the first one first."""
        silent = {worker.connection: rank for rank, worker in enumerate(ranks)}
        said: dict[int, bytes] = {}
        failed: list[str] = []
        end = time.monotonic() + timeout_s + GRACE_S
        while silent and (ready := wait(list(silent), max(0.0, end - time.monotonic()))):
            for connection in ready:
                rank = silent.pop(connection)
                try:
                    fine, answer = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    ranks[rank].process.join()
                    code = ranks[rank].process.exitcode
                    fine, answer = False, f"ended with exit code {code}\n{ranks[rank].log.read_text()}".encode()
                if fine:
                    said[rank] = answer
                    continue
                if not failed:
                    end = min(end, time.monotonic() + GRACE_S)
                failed.append(f"rank {rank}: {answer.decode()}")
        for rank in silent.values():
            os.kill(ranks[rank].process.pid, signal.SIGUSR1)  # it writes down where it is
        if silent:
            time.sleep(0.5)
        failed += [f"rank {rank}: did not end; it is in\n{ranks[rank].log.read_text()}" for rank in silent.values()]
        return said, failed

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)


_pools: list[_Pool] = []


def run_in(processes: int, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """What ``function(*args)``, which a module holds, returns on each rank; it must be something torch.save takes.

    Raises:
        AssertionError: a rank that raised, died or did not end, with where that was.
    """
    if not _pools:
        _pools.append(_Pool())
    return _pools[0].run(processes, function, args, timeout_s)


def end_workers() -> None:
    """What the session of tests does at its end; a call after it starts others."""
    while _pools:
        _pools.pop().close()


def _serve(connection: Connection, log: str) -> None:
    """A worker: answers one call after the other until nobody listens."""
    import faulthandler
    import gc

    import torch

    gc.freeze()  # of what is imported nothing goes: to look through it would take longer than a call
    said = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(_answer(call)))


def _answer(call: bytes) -> tuple[bool, bytes]:
    import torch
    import torch.distributed as dist

    try:
        (store, rank, processes, timeout_s), function, args = pickle.loads(call)
        torch.manual_seed(0)
        # A file, not a port: ports of runs that stand side by side collide.
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, processes), rank=rank, world_size=processes,
            timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
        result = io.BytesIO()
        torch.save(function(*args), result)
        dist.barrier()  # no rank closes its connections while another still reads from them
        return True, result.getvalue()
    except BaseException:
        return False, traceback.format_exc().encode()
    finally:
        _forget()


def _forget() -> None:
    """The group, and what DTensor keeps of its meshes: equal ones of another group would be taken for them."""
    import gc

    import torch.distributed as dist
    from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    if dist.is_initialized():
        dist.destroy_process_group()
    _clear_sharding_prop_cache()
    _gen_transform_infos.cache_clear()
    clear_redistribute_planner_cache()
    gc.collect()
