"""Reads Triton's GPU dialect (TTGIR): how the matmuls of a kernel get their operands.

An operand of a matmul inside a loop is multi-buffered if its tiles arrive by asynchronous copies in a buffer with a
leading dimension, of which ``memdesc_index`` (``memdesc_subview`` in older versions) takes one tile a turn::

    %x = ttg.local_alloc : () -> !ttg.memdesc<3x128x64xbf16, ...>
    %0 = scf.for ... {
      %1 = ttg.memdesc_index %x[%i] : !ttg.memdesc<3x128x64xbf16, ...> -> !ttg.memdesc<128x64xbf16, ...>
      %2 = ttng.warp_group_dot %1, ...
      %3 = ttg.memdesc_index %x[%j] : ...
      %4 = ttg.async_copy_global_to_local %x_ptrs, %3 ...

The text is parsed into a graph of values, and operands are followed back through it to the arguments they come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

DOTS = ("tt.dot", "tt.dot_scaled", "ttng.warp_group_dot")
LOADS = ("tt.load", "tt.descriptor_load", "tt.descriptor_gather")
COPIES = ("ttg.async_copy_global_to_local", "ttng.async_tma_copy_global_to_local", "ttng.async_tma_gather")
TAKES_ONE = ("ttg.memdesc_index", "ttg.memdesc_subview")
FIRST_OPERAND_ONLY = (*TAKES_ONE, "ttg.local_load", "ttg.memdesc_subslice", "ttg.memdesc_trans")
LOOPS = ("scf.for", "scf.while")

_NAME = r"%[\w$.-]+"
_LINE = re.compile(rf"(?:((?:{_NAME}(?::\d+)?(?:, )?)+) = )?\"?([a-z_]+\.[\w.]+)\"?(.*)")
_USE = re.compile(rf"({_NAME})(?:#(\d+))?")


@dataclass(eq=False)
class Value:
    """One result of one operation, or an argument of the kernel (op "argument") or of a region (op "carried")."""

    op: str
    text: str
    operands: list[Value]
    loops: tuple[int, ...]
    writes: list[Value] = field(default_factory=list)  # for memory: the operations that fill it


@dataclass(frozen=True)
class Read:
    """A matmul inside a loop reads ``argument`` in that loop, through this many buffers (1: also without any)."""

    argument: str
    buffers: int


class Kernel:
    """The graph of a kernel. ``dots``: its matmuls; ``arguments``: its pointers and descriptors."""

    def __init__(self, text: str) -> None:
        self.dots: list[Value] = []
        self.arguments: dict[str, Value] = {}
        self._scopes: list[dict[str, list[Value]]] = [{}]
        self._regions: list[tuple[str, list[Value], list[Value]]] = []  # operation, its results, what a region carries
        self._loops: tuple[int, ...] = ()
        for number, line in enumerate(text.splitlines()):
            self._read_line(number, line.strip())

    def loop_reads(self) -> list[tuple[Value, set[Read]]]:
        """For each matmul inside a loop what it reads there; an operand prepared before the loop does not count."""
        found = []
        for dot in self.dots:
            if dot.loops:
                operands = dot.operands[:2]
                found.append((dot, {read for operand in operands for read in self._reads(operand, dot.loops[-1])}))
        return found

    def _reads(self, operand: Value, loop: int) -> Iterator[Read]:
        waiting, seen = [(operand, False)], set()
        while waiting:
            value, indexed = waiting.pop()
            if (value, indexed) in seen:
                continue
            seen.add((value, indexed))
            if value.op in DOTS:  # an operand that is a product itself, but not what that is added to
                waiting += [(v, False) for v in value.operands[:2] if loop in value.loops]
                continue
            if value.op in LOADS and loop in value.loops:
                yield from (Read(name, 1) for name in self._addressed(value.operands[:1]))
            elif value.op == "ttg.local_alloc":
                buffers = _leading(value) if indexed else 1
                for write in value.writes:
                    if write.op not in COPIES:
                        waiting.append((write.operands[0], False))
                    elif loop in write.loops:
                        yield from (Read(name, buffers) for name in self._addressed(write.operands[:1]))
            if value.op not in LOADS:
                indexed = indexed or value.op in TAKES_ONE
                followed = value.operands[:1] if value.op in FIRST_OPERAND_ONLY else value.operands
                waiting += [(v, indexed) for v in followed]

    def _addressed(self, addresses: Iterable[Value]) -> set[str]:
        """The arguments that an address is made of."""
        origins = {value: name for name, value in self.arguments.items()}
        direct = {origins[v] for v in _back(addresses, stop=LOADS) if v in origins}
        return direct or {origins[v] for v in _back(addresses) if v in origins}  # addresses kept in memory

    def _read_line(self, number: int, line: str) -> None:
        if line.startswith("}"):
            self._scopes.pop()
            operation, results, carried = self._regions.pop()
            self._loops = self._loops[:-1] if operation in LOOPS else self._loops
            if line.endswith("{"):  # `} else {`, `} do {`: another region of the same operation
                self._open(number, operation, results, carried)
        elif line.startswith("tt.func"):
            for name, kind in re.findall(rf"({_NAME}): (!tt\.\w+|\w+)", line):
                value = Value("argument", line, [], ())
                self._scopes[-1][name] = [value]
                if kind.startswith(("!tt.ptr", "!tt.tensordesc")):
                    self.arguments[name[1:]] = value
            self._open(number, "tt.func", [], [])
        elif line.startswith("^"):  # the arguments of a region that is no `scf.for`
            names, results = re.findall(rf"({_NAME}):", line), self._regions[-1][1]
            self._scopes[-1] |= {name: [Value("carried", line, list(results), self._loops)] for name in names}
        elif match := _LINE.match(line):
            self._read_operation(number, line, *match.groups())
        elif line.endswith("{"):
            self._open(number, "module", [], [])

    def _read_operation(self, number: int, line: str, names: str | None, op: str, rest: str) -> None:
        carried_names = re.findall(rf"({_NAME}) = ({_NAME}(?:#\d+)?)", rest) if op in LOOPS else []
        uses = [self._resolve(name, index) for name, index in _USE.findall(rest)]
        operands = [v for v in uses if v is not None]
        carried = [Value("carried", line, [], self._loops) for _ in carried_names]
        for value, (_, start) in zip(carried, carried_names, strict=True):
            value.operands += [v for v in [self._resolve(*_USE.match(start).groups())] if v is not None]
        results = self._define(names, op, line, operands, carried)
        if op in DOTS:
            self.dots.append(Value(op, line, operands, self._loops))
        elif op in COPIES:
            self._write(Value(op, line, operands, self._loops), _destination(rest, uses))
        elif op == "ttg.local_store":
            self._write(Value(op, line, operands, self._loops), operands[1])
        elif op == "ttng.tensormap_create":
            operands[0].operands.append(operands[1])
        elif op == "scf.yield":
            self._yield(operands)
        elif op == "scf.condition":
            self._connect(self._regions[-1][1], operands[1:])
        if line.endswith("{"):
            self._open(number, op, results, carried)
            self._scopes[-1] |= {name: [v] for (name, _), v in zip(carried_names, carried, strict=True)}

    def _define(
        self, names: str | None, op: str, line: str, operands: list[Value], carried: list[Value]
    ) -> list[Value]:
        results = []
        for name, count in re.findall(rf"({_NAME})(?::(\d+))?", names or ""):
            group = [Value(op, line, [], self._loops) for _ in range(int(count or 1))]
            self._scopes[-1][name] = group
            results += group
        for i, result in enumerate(results):
            if op.startswith("scf."):  # what the regions yield; of a loop that never runs, what it started from
                result.operands += carried[i + 1].operands if op == "scf.for" else []
            elif op == "ttng.warp_group_dot_wait":
                result.operands.append(operands[i])
            else:
                result.operands += operands
        return results

    def _open(self, number: int, op: str, results: list[Value], carried: list[Value]) -> None:
        self._scopes.append({})
        self._regions.append((op, results, carried))
        self._loops = (*self._loops, number) if op in LOOPS else self._loops

    def _yield(self, yielded: list[Value]) -> None:
        op, results, carried = self._regions[-1]
        if op != "scf.while":
            self._connect(results, yielded)
        if op in LOOPS:
            self._connect(carried[op == "scf.for" :], yielded)  # the first one of `scf.for` counts the turns

    @staticmethod
    def _connect(values: list[Value], sources: list[Value]) -> None:
        for value, source in zip(values, sources, strict=True):
            value.operands.append(source)

    def _write(self, write: Value, destination: Value) -> None:
        for value in _back([destination]):
            if value.op == "ttg.local_alloc":
                value.writes.append(write)

    def _resolve(self, name: str, index: str | None) -> Value | None:
        """The innermost value of that name: sibling regions use names again."""
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name][int(index or 0)]
        return None


def _back(values: Iterable[Value], stop: tuple[str, ...] = ()) -> Iterator[Value]:
    """Everything the values are made of, not looking behind the operations in ``stop``."""
    waiting, seen = list(values), set()
    while waiting:
        value = waiting.pop()
        if value not in seen:
            seen.add(value)
            yield value
            waiting += [] if value.op in stop else value.operands


def _destination(rest: str, uses: list[Value | None]) -> Value:
    """The buffer of an asynchronous copy: its second operand, or for a descriptor the one after the coordinates."""
    position = len(_USE.findall(rest.split("]", 1)[0])) if re.match(rf" {_NAME}\[", rest) else 1
    return uses[position]


def _leading(alloc: Value) -> int:
    return int(re.search(r"-> !ttg\.memdesc<(\d+)x", alloc.text)[1])
