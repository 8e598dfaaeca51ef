"""Finds the tiles of one call, and whether the call is then faster than on ATen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ..kernels.routed_lora.candidates import candidates
from ..kernels.routed_lora.tables import Call, Ratio, Table, Verdict, use
from ..kernels.routed_lora.tiles import Key, Tile, Tuned, rows_of
from ..testing import Spread, take_turns
from .problem import Problem

SECONDS_A_KEY = 0.4
SECONDS_A_VERDICT = 0.6
MOST_SPILLED = 16
"""Registers a thread may spill; a candidate that spills more is not timed."""


class TimeUp(Exception):
    """The time limit has passed; what is in the table is whole."""


class Search:
    """Fills ``table``, which the launchers of ``device`` read from here on, and saves it in ``folder`` after every key
    and every verdict. ``again``: what is in the table already is measured anew. ``say`` is told what is found."""

    def __init__(
        self, device: torch.device, table: Table, folder: Path, deadline: float, again: bool, say: Callable[[str], None]
    ) -> None:
        self.device, self.table, self.folder, self.deadline, self.say = device, table, folder, deadline, say
        self.done: set[Key | Call] = set() if again else {*table.tiles, *table.calls}
        self.refused = 0
        use(device, table)

    def tune(self, call: Call) -> None:
        """Measure what is not done yet of a call. TimeUp in between; what fails its proof is counted, and not saved."""
        if call in self.done:
            return
        self._check_the_clock()
        problem = Problem(call, self.device)
        if not self._is_right(problem, "triton") or not self._is_right(problem, "aten"):
            return
        for key, launches in asked(problem, self.table).items():
            if key not in self.done:
                self._search(key, launches, problem)
                self.done.add(key)
        self._check_the_clock()
        if self._is_right(problem, "triton"):
            self._judge(call, problem)
            self.done.add(call)

    def _check_the_clock(self) -> None:
        if time.monotonic() > self.deadline:
            raise TimeUp

    def _is_right(self, problem: Problem, backend: str) -> bool:
        try:
            problem.check(backend)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # wrong results, or whatever kept it from any
            self.refused += 1
            self.say(f"    REFUSED {backend}: {type(error).__name__}: {_first_lines(error)}")
            return False
        return True

    def _search(self, key: Key, launches: list[Callable[[], object]], problem: Problem) -> None:
        """Prove the candidates for ``key``, time those that are right, keep the default unless another is faster beyond
        the spread."""
        before, found = self.table.tiles.get(key), None
        try:
            found = self._best(key, launches, problem)
        finally:
            keep = found or before
            if keep:
                self.table.tiles[key] = keep
            else:
                self.table.tiles.pop(key, None)
        if found:
            self.table.save(self.folder)

    def _best(self, key: Key, launches: list[Callable[[], object]], problem: Problem) -> Tuned | None:
        right: list[Tile] = []
        dropped: dict[str, str] = {}
        default, *_ = tiles = candidates(key)
        for tile in tiles:
            self._check_the_clock()
            self.table.tiles[key] = Tuned(tile, 0.0, 0.0)
            if why := self._why_not(problem):
                dropped[str(tile)] = why
                self.say(f"    {key.op} drops {tile}: {why}")
            else:
                right.append(tile)
        if default not in right:
            return None

        def run(tile: Tile) -> None:
            self.table.tiles[key] = Tuned(tile, 0.0, 0.0)
            for launch in launches:
                launch()

        turns = {str(tile): (partial(run, tile), _nothing) for tile in right}
        rounds = take_turns(turns, self.device, SECONDS_A_KEY)
        seconds = {tile: Spread.of(rounds[str(tile)].forward).median for tile in right}
        fastest = min(right, key=seconds.__getitem__)
        if rounds[str(fastest)].ratios(rounds[str(default)])["forward"].p80 >= 1:
            fastest = default
        self.say(
            f"    {key.op} N {key.N} K {key.K} r {key.r}: {fastest}, {seconds[fastest] * 1e3:.3f} ms, "
            f"default {seconds[default] * 1e3:.3f} ms; {len(right)} of {len(tiles)} timed"
        )
        return Tuned(fastest, seconds[fastest], seconds[default], dropped)

    def _why_not(self, problem: Problem) -> str:
        """Why the tile in the table cannot be timed; empty if it can."""
        before = compiled()
        try:
            problem.check("triton")
        except AssertionError as error:
            return f"REFUSED, wrong results: {_first_lines(error)}"
        except Exception as error:  # whatever the compiler or the launch raises is the finding
            return f"{type(error).__name__}: {_first_lines(error)}"
        spilled = max((spills for kernel, spills in compiled().items() if kernel not in before), default=0)
        return f"spills {spilled} registers a thread" if spilled > MOST_SPILLED else ""

    def _judge(self, call: Call, problem: Problem) -> None:
        """Time the whole call on both backends, at both ends of its bucket."""
        ratios = []
        for rows in rows_of(call.bucket):
            turns = {backend: problem.step(backend, rows) for backend in ("triton", "aten")}
            rounds = take_turns(turns, self.device, SECONDS_A_VERDICT)
            forward, _, both = rounds["triton"].ratios(rounds["aten"]).values()
            ratios.append(Ratio(rows, astuple(forward), astuple(both)))
            self.say(f"    triton over aten: {ratios[-1]}")
        verdict = Verdict.of(tuple(ratios))
        self.say(f"    auto takes {'triton' if verdict.wins else 'aten'}")
        self.table.calls[call] = verdict
        self.table.save(self.folder)


def _nothing(result: object) -> None:
    """The backward of what has none."""


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


class _Asked(dict[Key, Tuned]):
    """Tiles that note for which keys they were asked."""

    def __init__(self, tiles: dict[Key, Tuned]) -> None:
        super().__init__(tiles)
        self.keys_asked: list[Key] = []

    def get(self, key: Key, default: Any = None) -> Any:
        self.keys_asked.append(key)
        return super().get(key, default)


def asked(problem: Problem, table: Table) -> dict[Key, list[Callable[[], object]]]:
    """The keys for which forward and backward of a call look up tiles, and the launches that do."""
    found: dict[Key, list[Callable[[], object]]] = {}
    tiles, table.tiles = table.tiles, (noting := _Asked(table.tiles))
    try:
        with _recorded(noting, found):
            forward, backward = problem.step("triton", problem.M)
            backward(forward())
    finally:
        table.tiles = tiles
    return found


@contextmanager
def _recorded(noting: _Asked, found: dict[Key, list[Callable[[], object]]]) -> Iterator[None]:
    from ..kernels.routed_lora import triton

    def recording(primitive: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            noting.keys_asked.clear()
            result = primitive(*args)
            for key in dict.fromkeys(noting.keys_asked):
                found.setdefault(key, []).append(partial(primitive, *args))
            return result

        return call

    with ExitStack() as stack:
        for name in ("shrink", "linear", "reduce"):
            stack.enter_context(mock.patch.object(triton, name, recording(getattr(triton, name))))
        yield


def compiled() -> dict[int, int]:
    """Registers that each compiled kernel of routed LoRA spills, by its identity; none under the interpreter."""
    from ..kernels.routed_lora.triton import linear_kernels, reduce, shrink

    found: dict[int, int] = {}
    for module in (linear_kernels, reduce, shrink):
        for function in vars(module).values():
            for kernels, *_ in getattr(function, "device_caches", {}).values():
                found |= {id(kernel): getattr(kernel, "n_spills", None) or 0 for kernel in kernels.values()}
    return found
