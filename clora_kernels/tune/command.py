"""The command: which calls, for how long, and where the table goes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ..dispatch.routed_lora import why_not_triton
from ..kernels.routed_lora.tables import Call, Table, read, stamp_of, user_folder
from ..kernels.routed_lora.tiles import MOST_RANKS, block_of_rank, bucket, rows_of
from .problem import DTYPES, OPTIONS
from .search import Search, TimeUp

CANNOT_RUN, INTERRUPTED = 2, 130

Shape = tuple[int, tuple[int, ...]]

SHAPES: list[Shape] = [
    *((4096, (N,)) for N in (4096, 14336, 1024)),  # Llama 3 8B: q and o, gate and up, k and v,
    (14336, (4096,)),  # down,
    (4096, (4096, 1024, 1024)),  # q, k and v of one x,
    (4096, (14336, 14336)),  # gate and up of one x
    *((8192, (N,)) for N in (8192, 1024, 28672)),  # the same of Llama 3 70B
    (28672, (8192,)),
    (8192, (8192, 1024, 1024)),
    (8192, (28672, 28672)),
    (768, (768,)),  # ViT-B
    (768, (3072,)),
    (3072, (768,)),
    (768, (768, 768, 768)),
]
"""(K, N of each projection), most valuable first."""

ROWS = (8192, 4096, 2048, 1, 1024, 16384, 512, 64, 256, 128, 32)
"""A number of rows of every bucket, most valuable first."""

FOR_THE_INTERPRETER: list[Shape] = [(48, (40,))]
"""Enough to see the command work; nothing is fast there."""


def shape(text: str) -> Shape:
    """``K,N``, or ``K,N+N+N`` for a group of layers of one x. Raises ValueError for anything else."""
    K, N = text.split(",")
    found = int(K), tuple(int(n) for n in N.split("+"))
    if min(found[0], *found[1]) < 1:
        raise ValueError(text)
    return found


def positive(text: str) -> int:
    """A size. Raises ValueError below 1."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def rank(text: str) -> int:
    """A rank from 1 to 256. Raises ValueError beyond."""
    if (r := positive(text)) > MOST_RANKS:
        raise ValueError(text)
    return r


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="K,N", help="layers, K,N+N+N a group of one x "
                        "(default: the linears of Llama 3 8B and 70B and of ViT-B)")  # fmt: skip
    parser.add_argument("--rank", nargs="+", type=rank, default=[16], metavar="R", help="ranks (default: 16)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="of x (default: bf16)")
    parser.add_argument("--rows", nargs="+", type=positive, metavar="M", help="rows of x; each stands for its bucket "
                        "(default: all buckets, 8192 first)")  # fmt: skip
    parser.add_argument(
        "--options", nargs="+", choices=["plain", *OPTIONS[1:]], default=["plain", "dropout", "frozen"],
        help="of the adapter: dropout, a frozen routing (default: plain dropout frozen)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1800.0, help="time limit (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of the table (default: the one auto reads, "
                        "that of CLORA_TABLES, else ~/.cache/clora_kernels/tables)")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure anew what the table holds already")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ..; cpu under TRITON_INTERPRET=1, to try the "
                        "command itself (default: %(default)s)")  # fmt: skip


def plan(options: argparse.Namespace, on_cpu: bool) -> Iterator[Call]:
    """The calls to measure, most valuable first, none twice."""
    shapes = options.shapes or (FOR_THE_INTERPRETER if on_cpu else SHAPES)
    rows = options.rows or (ROWS[3:4] if on_cpu else ROWS)
    seen = set()
    for dtype in options.dtype:
        for r in options.rank:
            for M in rows:
                for chosen in options.options:
                    for K, N in shapes:
                        call = Call(dtype, K, N, block_of_rank(r), bucket(M), "" if chosen == "plain" else chosen)
                        if call not in seen:
                            seen.add(call)
                            yield call


def run(options: argparse.Namespace) -> int:
    """Tune; returns the exit status: 1 if a backend was wrong, 2 if nothing can run here, 130 if interrupted."""
    begun = time.monotonic()
    device, why_not = _device(options.device)
    stamp = None if why_not else stamp_of(device)
    if stamp is None:
        return _cannot(f"--device {options.device}: {why_not or 'under TRITON_INTERPRET=1 only cpu is tuned'}")
    folder = options.output or user_folder()
    path = folder / stamp.file_name
    try:
        table = read(path) if path.exists() else Table(stamp)
        table.save(folder)
    except (ValueError, OSError) as error:
        return _cannot(f"{path}: {error}; move it away, or name another folder with --output")
    calls = list(plan(options, device.type == "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current one
    search = Search(device, table, folder, begun + options.seconds, options.again, _say)
    _say(f"{stamp.device}, triton {stamp.triton}, torch {stamp.torch}: {len(calls)} calls in {options.seconds:.0f} s")
    _say(f"{path}: {table}")
    status = _tune(search, calls, device)
    _say(f"{path}: {table}")
    if folder.resolve() != user_folder().resolve():
        _say(f"auto reads it where CLORA_TABLES={folder} is set")
    return status


def _tune(search: Search, calls: list[Call], device: torch.device) -> int:
    left = [call for call in calls if call not in search.done]
    if len(left) < len(calls):
        _say(f"{len(calls) - len(left)} calls are in the table already")
    try:
        for i, call in enumerate(left, 1):
            _say(f"[{i}/{len(left)}] {described(call)}")
            try:
                search.tune(call)
            except torch.OutOfMemoryError as error:
                _say(f"    left out, it does not fit the memory: {str(error).splitlines()[0]}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except TimeUp:
        _say(f"the time is up: {i - 1} of {len(left)} calls are done, and the same command goes on from here")
    except KeyboardInterrupt:
        _say(f"interrupted: {i - 1} of {len(left)} calls are done, and the same command goes on from here")
        return INTERRUPTED
    if search.refused:
        _say(f"{search.refused} refused, which should not be: please report it")
    return int(search.refused > 0)


def described(call: Call) -> str:
    """A call in words."""
    fewest, most = rows_of(call.bucket)
    N = "+".join(map(str, call.N))
    return f"{call.dtype} K {call.K} N {N} r {call.r} M {fewest}..{most} {call.options or 'plain'}"


def _device(name: str) -> tuple[torch.device, str]:
    """The device of that name, and why nothing can be tuned on it; empty if it can."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        return torch.device("cpu"), str(error).splitlines()[0]
    return device, why_not_triton(torch.bfloat16, device.type, device.index)


def _say(line: str) -> None:
    print(line, flush=True)


def _cannot(why: str) -> int:
    print(f"clora_kernels tune: {why}", file=sys.stderr)
    return CANNOT_RUN
