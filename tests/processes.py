"""Runs a function in several processes of one gloo group, each on one thread."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_S = 300

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
        "clora_kernels",
    ]
)


def run_in(processes: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)``, which a module holds, returns on each rank; it must be something torch.save takes.

    Raises:
        AssertionError: a rank that raised, with its traceback, or did not end.
    """
    with tempfile.TemporaryDirectory(prefix="processes-") as folder:
        started = [_CONTEXT.Process(target=_run, args=(folder, r, processes, function, args)) for r in range(processes)]
        for process in started:
            process.start()
        return _results(Path(folder), started)


def _results(folder: Path, started: list[Any]) -> list[Any]:
    import torch

    for process in started:
        process.join(TIMEOUT_S)
    late = [rank for rank, process in enumerate(started) if process.is_alive()]
    for rank in late:
        started[rank].kill()
    said = [f"rank {path.suffix[1:]}:\n{path.read_text()}" for path in sorted(folder.glob("error.*"))]
    assert not late and not said, f"ranks {late} did not end within {TIMEOUT_S} s\n" + "\n".join(said)
    ended = [process.exitcode for process in started]
    assert not any(ended), f"exit codes by rank: {ended}"
    return [torch.load(folder / f"result.{rank}", weights_only=False) for rank in range(len(started))]


def _run(folder: str, rank: int, processes: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        # A file, not a port: ports of runs that stand side by side collide.
        store = dist.FileStore(f"{folder}/store", processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
        result = function(*args)
        dist.barrier()  # no rank closes its connections while another still reads from them
        torch.save(result, f"{folder}/result.{rank}")
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/error.{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None
