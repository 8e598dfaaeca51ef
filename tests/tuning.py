"""Tuning without a clock: what is timed is run once, and as fast as the test says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import made

from clora_kernels.__main__ import main
from clora_kernels.kernels.routed_lora import tables, tiles
from clora_kernels.kernels.routed_lora.candidates import candidates
from clora_kernels.kernels.routed_lora.tiles import Key
from clora_kernels.testing import Rounds
from clora_kernels.tune import search


def rig(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str], tuple[Any, Any]]) -> list[list[str]]:
    """``seconds`` of forward and backward of each contestant, a backend or a tile, the same in five rounds or one for
    each; returns who met whom."""
    met: list[list[str]] = []

    def take_turns(contestants: dict[str, Any], device: torch.device, limit: float) -> dict[str, Rounds]:
        met.append(list(contestants))
        found = {}
        for name, (forward, backward) in contestants.items():
            backward(forward())
            found[name] = Rounds(*(s if isinstance(s, list) else [s] * 5 for s in seconds(name)))
        return found

    monkeypatch.setattr(search, "take_turns", take_turns)
    return met


def tune(device: torch.device, *arguments: str, shapes: str = "48,40", options: str = "plain") -> int:
    """The command on one small layer, in fp32 and of few rows; its exit status."""
    few = ["--shapes", shapes, "--rank", "4", "--dtype", "fp32", "--rows", "16", "--options", options]
    return main(["tune", "--device", device.type, *few, *arguments])


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are read anew when they are next asked, and again after the test."""
    monkeypatch.setattr(tables, "_LOADED", {})


def own_table(device: torch.device) -> tables.Table:
    """What the user's folder holds for the device."""
    return tables.read(tables.user_folder() / tables.stamp_of(torch.empty(0, device=device).device).file_name)


def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of tables, and of the candidates the first two."""
    monkeypatch.setenv("CLORA_TABLES", str(tmp_path))
    monkeypatch.setattr(search, "candidates", lambda key: candidates(key)[:2])
    forget(monkeypatch)
    return tmp_path


FASTER, SLOWER = (0.5, 0.5), (2.0, 2.0)


def triton_wins(name):
    """Of tiles all but the default are fast."""
    return {"triton": (0.9, 0.9), "aten": (1.0, 1.0)}.get(name) or (SLOWER if name in DEFAULTS else FASTER)


def aten_wins(name):
    return (1.1, 1.1) if name == "triton" else (1.0, 1.0)


DEFAULTS = {
    str(tiles.default(Key(op, capability, "fp32", 40, 48, 16, 0, tma=tma)))
    for op in ("linear", "shrink", "reduce") for capability in (0, 80, 90) for tma in (True, False)
}  # fmt: skip


def small(device, rows=16, N=40, r=4, **options):
    return made((rows,), 48, N, r, routing=False, device=device, **options)
