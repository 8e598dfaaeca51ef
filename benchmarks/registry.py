"""The operations that are measured, and what of them a command line asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import continual
import gram_schmidt
import peft_steps
import rank1_experts
import routed_lora
import torch
from operation import Operation

_MODULES = (routed_lora, gram_schmidt, rank1_experts, continual, peft_steps)
OPERATIONS: dict[str, Operation] = {module.OPERATION.name: module.OPERATION for module in _MODULES}
CONTESTANTS = list(dict.fromkeys(name for operation in OPERATIONS.values() for name in operation.builders))


@dataclass(frozen=True)
class Selection:
    """Points and contestants of an operation: its yardstick first, and above whose memory others are reported."""

    operation: Operation
    points: list[Any]
    contestants: list[str]


def select(
    device: torch.device,
    op: str | None = None,
    points: str | None = None,
    contestants: str | None = None,
    quick: bool = False,
) -> list[Selection]:
    """What is to be measured: of one operation or of all, the points and contestants of comma-separated names; without
    names all of them, or the quick ones. An operation that has none of the named, or misses a package, is left out.

    Raises ValueError for a name that is not among them, and where no operation is left.
    """
    operations = [o for o in OPERATIONS.values() if not o.missing] if op is None else [OPERATIONS[op]]
    if missing := operations[0].missing:
        raise ValueError(f"op: {op} needs {', '.join(missing)}, not installed here")
    wanted_points = _names("points", points, (p.name for o in operations for p in o.points(device)))
    wanted = _names("contestants", contestants, (name for o in operations for name in o.builders))
    selections = []
    for operation in operations:
        by_name = {point.name: point for point in operation.points(device)}
        if wanted_points is None:
            some = [point for point in by_name.values() if point.quick or not quick]
        else:
            some = [by_name[name] for name in wanted_points if name in by_name]
        if wanted is None:
            who = [name for name in operation.builders if not (quick and name in operation.slow)]
        else:
            who = [name for name in wanted if name in operation.builders]
        if some and who:
            always = [operation.yardstick, *filter(None, [operation.memory_above])]
            selections.append(Selection(operation, some, list(dict.fromkeys([*always, *who]))))
    if not selections:
        raise ValueError(f"contestants: got {contestants!r}, none of the operation that has the points {points!r}")
    return selections


def _names(what: str, names: str | None, known: Iterable[str]) -> list[str] | None:
    wanted, listed = None if names is None else names.split(","), list(dict.fromkeys(known))
    for name in wanted or ():
        if name not in listed:
            raise ValueError(f"{what}: got {name!r}, expected some of {', '.join(listed)}")
    return wanted
