"""Random calls of the primitives of rank-1 experts, each against fp64, on memory that ends with its last element:

    python rank1_experts_calls.py compiled CALLS SEED      the operators of the package that Python finds
    python rank1_experts_calls.py FOLDER CALLS SEED        the CUDA kernels, emulated by the libraries in a folder
    ... PRIMITIVE ...                                      no others than these

A program of its own, as sanitizers must be loaded before Python is. It prints how often each primitive was called.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from rank1_experts_emulated import Emulated
from rank1_experts_primitives import plain_expand, plain_reduce, plain_shrink
from torch import Tensor

from clora_kernels import extension
from clora_kernels.testing import assert_parity, unchanged

PRIMITIVES = ("shrink", "expand", "reduce")
F32, F64 = torch.float32, torch.float64
FLOATS = (F32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sizes:
    G: int
    L: int
    k: int
    n: int
    E: int


def sizes_of_blocks(random: Random) -> Sizes:
    """Around the blocks of the CPU: tiles of 3 and 4 rows, 4 and 64 choices, 8 to 512 columns."""
    G, L = random.choice([(1, 1), (7, 1), (40, 1), (3, 3), (2, 13), (2, 70), (0, 1), (3, 0)])
    k, n = random.choice([0, 1, 4, 5, 33, 66]), random.choice([0, 1, 7, 16, 64, 257, 515, 1027])
    return Sizes(G, L, k, n if G * L * k < 2000 else n % 256, random.choice([1, 11, 300]))


def sizes_of_tiles(random: Random, primitive: str) -> Sizes:
    """Around the tiles of a GPU: 4 rows, 8 slots, 32 choices, 128 or 256 columns, 8 warps."""
    draw = random.randint
    L = random.choice([1, 1, 3, draw(1, 11)])
    G, k, E = draw(0, 8), random.choice([draw(0, 9), draw(30, 70)]), random.choice([draw(1, 20), draw(1, 700)])
    n = random.choice([8 * draw(0, 40), draw(1, 300)])
    if primitive == "shrink" and draw(0, 1):  # in chunks, or by several warps
        G, k, n, E = draw(1, 6), draw(1, 12), random.choice([8 * draw(100, 300), draw(800, 2400)]), draw(1, 4)
    elif primitive == "expand" and draw(0, 1):  # slots for several warps
        G, k = draw(1, 3), draw(4, 40)
    elif primitive == "reduce" and draw(0, 5) == 0:  # more tiles than blocks that share a run
        L, G, k, n, E = 1, draw(40, 45), draw(9, 11), random.choice([8 * draw(180, 250), draw(1440, 2000)]), 2
    elif primitive == "reduce" and draw(0, 2):  # a run over several chunks of 32
        n = random.choice([8 * draw(4, 100), draw(32, 800)])
        G, k, E = (draw(70, 99) // L, draw(8, 11), draw(1, 3)) if draw(0, 1) else (draw(1, 25), draw(1, 9), draw(1, 6))
    return Sizes(G, L, k, n, E)


class Calls:
    def __init__(self, primitives: Any, random: Random, on_gpu: bool) -> None:
        self.primitives, self.random, self.on_gpu = primitives, random, on_gpu
        self.done: Counter[str] = Counter()

    def memory(self, rows: int, n: int, dtype: torch.dtype, may_overlap: bool = True) -> tuple[Tensor, Tensor]:
        """Rows of NaN, dense, apart, off every boundary or, to be read alone, one on the other; and all there is with
        them, which ends where they do."""
        random, whole = self.random, 16 // dtype.itemsize
        stride, offset = random.choice([
            (n, 0), (n + random.randint(0, 5), random.randint(0, 3)), (-(-n // whole) * whole + whole, 0),
            (0 if may_overlap else n, 0),
        ])  # fmt: skip
        size = offset + ((rows - 1) * stride + n if rows and n else 0)
        memory = torch.full((size,), float("nan"), dtype=dtype)
        return memory, memory.as_strided((rows, n), (stride, 1), offset if rows and n else 0)

    def rows(self, rows: int, n: int, dtype: torch.dtype) -> Tensor:
        _, view = self.memory(rows, n, dtype)
        for row in view:
            row.copy_(torch.randn(n))
        return view

    def indices(self, s: Sizes) -> Tensor:
        """A hot expert now and then; on a GPU also what is outside the pool, which counts as its nearest expert."""
        indices = torch.randint(s.E, (s.G, s.k))
        if self.random.randint(0, 1):
            indices[torch.rand(s.G, s.k) < 0.9] = s.E // 2
        indices = indices.to(self.random.choice([torch.int32, torch.int64]))
        if self.on_gpu and self.random.randint(0, 1):
            info = torch.iinfo(indices.dtype)
            beyond = torch.tensor([info.min, info.max, -1, s.E], dtype=indices.dtype)
            indices = torch.where(torch.rand(s.G, s.k) < 0.1, beyond[torch.randint(4, (s.G, s.k))], indices)
        return indices

    def one(self, primitive: str) -> None:
        random = self.random
        s = sizes_of_tiles(random, primitive) if self.on_gpu else sizes_of_blocks(random)
        first, second = random.choice(FLOATS), random.choice(FLOATS)
        if not self.on_gpu and random.randint(0, 9) == 0:
            first = second = F64
        try:
            getattr(self, primitive)(s, self.indices(s), first, second)
        except AssertionError as error:
            raise AssertionError(f"{primitive} of {s} in {first} and {second}: {error}") from error
        self.done[primitive] += 1

    def small(self, s: Sizes, rows_dtype: torch.dtype) -> Tensor:
        return torch.randn(s.G * s.L, s.k, dtype=F64 if rows_dtype == F64 else F32)

    def shrink(self, s: Sizes, indices: Tensor, first: torch.dtype, second: torch.dtype) -> None:
        big, experts = self.rows(s.G * s.L, s.n, first), self.rows(s.E, s.n, second)
        with unchanged(big, experts, indices):
            out = self.primitives.shrink(big, experts, indices)
        check(out, plain_shrink, big=big, experts=experts, indices=indices)
        self.refuses(partial(self.primitives.shrink, big, experts), indices, s.E)

    def expand(self, s: Sizes, indices: Tensor, first: torch.dtype, second: torch.dtype) -> None:
        memory, y = self.memory(s.G * s.L, s.n, first, may_overlap=False)
        experts, small = self.rows(s.E, s.n, second), self.small(s, first)
        base = self.random.choice([None, self.rows(s.G * s.L, s.n, first)])
        with unchanged(experts, small, indices, *([] if base is None else [base])):
            self.primitives.expand_(y, small, experts, indices, base)
        check(y, plain_expand, small=small, experts=experts, indices=indices, base=base, dtype=first)
        self.refuses(lambda wrong: self.primitives.expand_(y, small, experts, wrong, base), indices, s.E)
        only_elements_are_written(memory, y)

    def reduce(self, s: Sizes, indices: Tensor, first: torch.dtype, second: torch.dtype) -> None:
        memory, out = self.memory(s.E, s.n, second, may_overlap=False)
        big, small = self.rows(s.G * s.L, s.n, first), self.small(s, first)
        order, starts = self.primitives.order(indices, s.E)
        inside = indices.clamp(0, s.E - 1).flatten().long()
        assert torch.equal(order.long(), inside.sort(stable=True).indices)
        assert torch.equal(starts.diff().long(), inside.bincount(minlength=s.E)) and starts[0] == 0
        with unchanged(big, small, indices, order, starts):
            self.primitives.reduce_(out, small, big, indices, order, starts)
        check(out, plain_reduce, small=small, big=big, indices=indices, experts=torch.zeros(s.E, s.n, dtype=second))
        self.refuses(lambda wrong: self.primitives.order(wrong, s.E), indices, s.E)
        self.lists_that_lie(s, out, small, big, indices, order, starts)
        only_elements_are_written(memory, out)

    def lists_that_lie(self, s: Sizes, *arguments: Tensor) -> None:
        """An order and starts of anything: the CPU refuses them, and on a GPU they lead nowhere outside."""
        *others, order, starts = arguments
        info, chosen = torch.iinfo(torch.int32), order.numel()
        wild = [
            torch.tensor([info.min, info.max, -40, chosen])[torch.randint(4, t.shape)].int() for t in (order, starts)
        ]
        if self.on_gpu:
            mixed = [torch.where(torch.rand(t.shape) < 0.5, t, w) for t, w in zip((order, starts), wild, strict=True)]
            self.primitives.reduce_(*others, *mixed)
            return
        for lists in ((wild[0], starts), (order, wild[1])):
            if lists[0].numel():
                must_refuse(lambda lists=lists: self.primitives.reduce_(*others, *lists))

    def refuses(self, call: Any, indices: Tensor, experts: int) -> None:
        """On a CPU: a choice outside the pool."""
        if self.on_gpu or not indices.numel():
            return
        for outside in (-1, experts, torch.iinfo(indices.dtype).min, torch.iinfo(indices.dtype).max):
            wrong = indices.clone()
            wrong.view(-1)[self.random.randrange(wrong.numel())] = outside
            must_refuse(lambda wrong=wrong: call(wrong))


def must_refuse(call: Any) -> None:
    try:
        call()
    except RuntimeError:
        return
    raise AssertionError("what leads outside was not refused")


def only_elements_are_written(memory: Tensor, view: Tensor) -> None:
    view.fill_(float("nan"))
    assert memory.isnan().all(), "something was written between the rows"


def check(actual: Tensor, plain: Any, **inputs: Any) -> None:
    """Parity with the plain form, for choices inside the pool."""
    experts, rows = inputs["experts"].shape[0], inputs["big" if "big" in inputs else "small"].shape[0]
    if rows == 0:
        assert not actual.numel() or (plain is plain_reduce and not actual.any())
        return
    inputs["indices"] = inputs["indices"].clamp(0, experts - 1)
    assert_parity({"y": actual}, inputs, reference=SimpleNamespace(forward=plain))


def compiled() -> Any:
    assert extension.has_op("rank1_experts_shrink", "cpu"), extension.status()[0].detail
    names = ("shrink", "expand_", "order", "reduce_")
    return SimpleNamespace(**{name: getattr(torch.ops.clora_kernels, f"rank1_experts_{name}") for name in names})


def main(what: str, count: str, seed: str, *wanted: str) -> None:
    torch.manual_seed(int(seed))
    torch.set_num_threads(1)
    primitives = compiled() if what == "compiled" else Emulated(Path(what), int(seed))
    calls = Calls(primitives, Random(int(seed)), on_gpu=what != "compiled")
    for i in range(int(count)):
        calls.one((wanted or PRIMITIVES)[i % len(wanted or PRIMITIVES)])
    if what == "compiled":
        big, indices, small = torch.randn(8200, 1031), torch.randint(7, (8200, 2)), torch.randn(8200, 2)
        out, lists = torch.empty(7, 1031), primitives.order(indices, 7)
        primitives.reduce_(out, small, big, indices, *lists)  # more rows than caches hold: block by block
        check(out, plain_reduce, small=small, big=big, indices=indices, experts=out)
    else:
        print({name: sorted(ways) for name, ways in primitives.ways.items()})
    print(dict(calls.done))


if __name__ == "__main__":
    main(*sys.argv[1:])
