"""Records out of JSON, whose every field is there and of its type."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints


def expect(value: Any, where: str, what: Any) -> Any:
    """``value``, if it is of that type, or a dict of exactly those names; else ValueError, which tells ``where``."""
    if isinstance(what, type):
        if type(value) is not what:
            raise ValueError(f"{where}: got {value!r}, expected {what.__name__}")
    elif type(value) is not dict or {*value} != what:
        got = sorted(value) if isinstance(value, dict) else repr(value)
        raise ValueError(f"{where}: got {got}, expected {sorted(what)}")
    return value


def parsed(kind: Any, value: Any, where: str) -> Any:
    """``value`` of JSON as a ``kind``: a number, text, a tuple or dict of one kind, or a record of such, a dataclass or
    a NamedTuple. ValueError, which tells ``where`` in the file, for anything else."""
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        hints = get_type_hints(kind)
        names = kind._fields if hasattr(kind, "_fields") else [f.name for f in fields(kind)]
        expect(value, where, {*names})
        return kind(**{name: parsed(hints[name], value[name], f"{where}.{name}") for name in names})
    if get_origin(kind) is tuple:
        of = get_args(kind)
        entries = expect(value, where, list)
        if of[-1] is not Ellipsis and len(of) != len(entries):
            raise ValueError(f"{where}: got {len(entries)} entries, expected {len(of)}")
        return tuple(parsed(of[0], entry, f"{where}[{i}]") for i, entry in enumerate(entries))
    if get_origin(kind) is dict:
        return {k: parsed(get_args(kind)[1], v, f"{where}.{k}") for k, v in expect(value, where, dict).items()}
    return float(value) if kind is float and type(value) is int else expect(value, where, kind)
