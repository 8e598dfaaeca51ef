"""What was measured on a device: the tiles that its kernels run with, and the calls for which they beat ATen.

A table is one JSON file, made by ``python -m clora_kernels tune`` for one GPU and one set of versions, its stamp. Files
are read from the folder ``shipped`` beside this file, where those that ship would lie, then from the user's: that of
the environment variable ``CLORA_TABLES``, else ``clora_kernels/tables`` in the user's cache. What the user measured
goes first. They are read once for a device, when it is first asked about; one made for another GPU or other versions is
left alone, one that cannot be read is warned of, and ``info()`` tells of both.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .algebra import Projection
from .records import expect, parsed
from .tiles import NAMES, Key, LinearTile, ReduceTile, ShrinkTile, Tile, Tuned, block_of_rank, bucket

FORMAT = 1
"""Of the files; one of another format is not read."""

_TILES: dict[str, type] = {"linear": LinearTile, "shrink": ShrinkTile, "reduce": ReduceTile}


@dataclass(frozen=True)
class Stamp:
    """What measurements depend on: the GPU, its compute capability, and versions."""

    device: str
    capability: str
    triton: str
    torch: str
    clora_kernels: str

    @property
    def file_name(self) -> str:
        words = f"{self.device} {self.clora_kernels} triton {self.triton} torch {self.torch}"
        return re.sub(r"[^a-z0-9.+]+", "-", words.lower()).strip("-") + ".json"

    def why_not(self, here: Stamp) -> str:
        """Why what was measured under this stamp says nothing about ``here``; empty if it does."""
        mine, theirs = asdict(self), asdict(here)
        return ", ".join(f"made for {k} {mine[k]}, here {theirs[k]}" for k in mine if mine[k] != theirs[k])


class Call(NamedTuple):
    """A whole call, as a table is asked about it: K, the N of each projection, the largest rank padded to its block, M
    in its bucket. ``options``: those that change what the large kernels do, joined by "+"; none of them is "".

    Bias, gate, scaling and a single routing are left out: they ride along in kernels that run anyway.
    """

    dtype: str
    K: int
    N: tuple[int, ...]
    r: int
    bucket: int
    options: str


def call_of(dtype: torch.dtype, M: int, projections: Sequence[Projection]) -> Call:
    """The call of these projections on M rows. It does not depend on strides of x or dy, which forward and backward do
    not share: both come to the same choice."""
    name = NAMES.get(dtype, "")
    if name == "fp32" and torch.backends.cuda.matmul.allow_tf32:
        name = "tf32"  # the rival is another one then
    N, r = [], 0
    delta = transposed = bank = frozen = dropout = False
    for j in projections:
        N.append(j.lora_B.shape[0])
        r = max(r, j.lora_A.shape[0])
        delta |= j.weight is None
        transposed |= j.weight is not None and j.weight.stride(1) != 1
        bank |= j.routing_index is not None
        frozen |= j.frozen_routing is not None
        dropout |= j.threshold is not None
    options = _joined(delta, transposed, bank, frozen, dropout)
    return Call(name, projections[0].lora_A.shape[1], tuple(N), block_of_rank(r), bucket(M), options)


@cache
def _joined(*given: bool) -> str:
    return "+".join(compress(("delta", "transposed", "bank", "frozen", "dropout"), given))


@dataclass(frozen=True)
class Ratio:
    """Time of backend ``triton`` over that of ``aten`` with M rows: (median, 20th, 80th percentile) of rounds in which
    they took turns."""

    M: int
    forward: tuple[float, float, float]
    both: tuple[float, float, float]

    def __str__(self) -> str:
        return f"forward {self.forward[0]:.3f}, forward + backward {self.both[0]:.3f} with {self.M} rows"


@dataclass(frozen=True)
class Verdict:
    """Whether ``auto`` takes ``triton`` for a call; ``source`` is the name of the file that says so."""

    wins: bool
    ratios: tuple[Ratio, ...]
    source: str = ""

    @classmethod
    def of(cls, ratios: tuple[Ratio, ...]) -> Verdict:
        """It wins if forward + backward is faster beyond the spread and forward alone not slower, at both ends of the
        bucket of M: which rows are to come, and whether backward follows, a call does not know."""
        return cls(all(ratio.both[2] < 1 and ratio.forward[0] <= 1 for ratio in ratios), ratios)

    @cached_property
    def reason(self) -> str:
        return f"time over ATen's, by {self.source}: {'; '.join(map(str, self.ratios))}"


@dataclass
class Table:
    """``tiles`` that launchers look up, ``calls`` that ``auto`` does; ``silence``: why a call is not among them."""

    stamp: Stamp | None
    tiles: dict[Key, Tuned] = field(default_factory=dict)
    calls: dict[Call, Verdict] = field(default_factory=dict)
    silence: str = "the table does not know this call"

    def __str__(self) -> str:
        wins = sum(verdict.wins for verdict in self.calls.values())
        return f"{len(self.tiles)} tiles, {len(self.calls)} calls, {wins} of them faster on triton"

    def save(self, folder: Path) -> Path:
        """Write the table into ``folder``, at once or not at all. OSError if that cannot be."""
        tiles = [{"key": asdict(key), **asdict(tuned)} for key, tuned in self.tiles.items()]
        calls = [
            {"call": call._asdict(), "wins": verdict.wins, "ratios": [asdict(ratio) for ratio in verdict.ratios]}
            for call, verdict in self.calls.items()
        ]
        lines = [f'"{name}": [\n  {_lines(rows)}\n ]' for name, rows in (("tiles", tiles), ("calls", calls))]
        lines = [f'"format": {FORMAT}', f'"stamp": {json.dumps(asdict(self.stamp))}', *lines]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.stamp.file_name
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
        part.replace(path)
        return path


def _lines(rows: list[dict[str, Any]]) -> str:
    """Rows of JSON, one a line."""
    return ",\n  ".join(map(json.dumps, rows))


def read(path: Path) -> Table:
    """The table in a file. ValueError, saying what is wrong, if it is none or of another format; OSError."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError("no table: it has no format")
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}, and this version of clora_kernels reads format {FORMAT}")
    expect(content, "the file", {"format", "stamp", "tiles", "calls"})
    table = Table(parsed(Stamp, content["stamp"], "stamp"))
    for i, entry in enumerate(expect(content["tiles"], "tiles", list)):
        key, tuned = _tuned(entry, f"tiles[{i}]")
        table.tiles[key] = tuned
    for i, entry in enumerate(expect(content["calls"], "calls", list)):
        where = f"calls[{i}]"
        expect(entry, where, {"call", "wins", "ratios"})
        ratios = parsed(tuple[Ratio, ...], entry["ratios"], f"{where}.ratios")
        wins = parsed(bool, entry["wins"], f"{where}.wins")
        table.calls[parsed(Call, entry["call"], f"{where}.call")] = Verdict(wins, ratios, path.name)
    return table


def _tuned(entry: Any, where: str) -> tuple[Key, Tuned]:
    expect(entry, where, {"key", "tile", "seconds", "default_seconds", "dropped"})
    key = parsed(Key, entry["key"], f"{where}.key")
    if key.op not in _TILES:
        raise ValueError(f"{where}.key.op: got {key.op!r}, expected one of {', '.join(_TILES)}")
    tile: Tile = parsed(_TILES[key.op], entry["tile"], f"{where}.tile")
    for name, value in asdict(tile).items():  # what Triton would not compile must not wait for a call to say so
        block = name.startswith("block")
        power = block or name == "num_warps"
        if type(value) is int and not ((16 if block else 1) <= value <= 1024 and not (power and value & (value - 1))):
            raise ValueError(f"{where}.tile.{name}: got {value}, which no kernel takes")
    seconds, of_default = (parsed(float, entry[name], f"{where}.{name}") for name in ("seconds", "default_seconds"))
    return key, Tuned(tile, seconds, of_default, parsed(dict[str, str], entry["dropped"], f"{where}.dropped"))


def user_folder() -> Path:
    """Where the user's tables are: ``CLORA_TABLES``, else in the cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("CLORA_TABLES") or Path(cache, "clora_kernels", "tables"))


@dataclass(frozen=True)
class File:
    """A file among the tables; ``problem``: why it cannot be read, empty if it can."""

    path: Path
    table: Table | None
    problem: str = ""


def files() -> list[File]:
    """What lies in the folders of tables, read: what ships, then the user's, which goes first where both know."""
    found = []
    for folder in (Path(__file__).parent / "shipped", user_folder()):
        try:
            paths = sorted(folder.glob("*.json"))
        except OSError as error:
            found.append(File(folder, None, str(error)))
            continue
        for path in paths:
            try:
                found.append(File(path, read(path)))
            except (ValueError, OSError) as error:
                found.append(File(path, None, str(error)))
    return found


def stamp_of(device: torch.device) -> Stamp | None:
    """The stamp of what is measured on ``device``; None where the kernels do not run."""
    from ... import __version__

    try:
        import triton
    except ImportError:
        return None
    interpreted = triton.knobs.runtime.interpret
    if device.type == "cuda" and torch.version.hip is None and not interpreted:
        properties = torch.cuda.get_device_properties(device)
        name, capability = properties.name, f"{properties.major}.{properties.minor}"
    elif device.type == "cpu" and interpreted:
        name, capability = "Triton interpreter", "0.0"
    else:
        return None
    return Stamp(name, capability, triton.__version__, torch.__version__, __version__)


def table_of(t: Tensor) -> Table:
    """What is known of the device of ``t``; read once."""
    device = _CPU if t.is_cpu else t.device  # a new device object for every call costs more than the look-up
    table = _LOADED.get(device)
    if table is None:
        table = _LOADED[device] = _load(device)
    return table


_CPU = torch.device("cpu")
_LOADED: dict[torch.device, Table] = {}


def use(device: torch.device, table: Table) -> None:
    """Make ``table`` what is known of a device, in place of what its files say."""
    _LOADED[device] = table


def _load(device: torch.device) -> Table:
    found = files() if device.type == "cuda" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") else []
    stamp = stamp_of(device) if found else None
    table, left, used = Table(stamp), [], []
    for file in found if stamp else []:
        problem = file.problem or file.table.stamp.why_not(stamp)
        if file.problem:
            message = f"{file.path}: this table of tiles is not used: {file.problem}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        if problem:
            left.append(f"{file.path.name} is not used: {problem}")
            continue
        used.append(file.path.name)
        table.tiles |= file.table.tiles
        table.calls |= file.table.calls
    table.silence = f"ATen matmuls are proved on {device.type}"
    if used:
        table.silence = f"{', '.join(used)} does not know this call, and ATen matmuls are proved on {device.type}"
    elif device.type == "cuda" or left:
        said = "; ".join(left) or "none is there, and `python -m clora_kernels tune` makes one"
        table.silence += f"; no table says that triton is faster ({said})"
    return table
