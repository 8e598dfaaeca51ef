"""Tables of tiles: what is read, what is refused, what is left alone; nothing breaks an import or a call."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from strategies import made
from tuning import forget

from clora_kernels import explain, info, routed_lora_linear
from clora_kernels.kernels.routed_lora import tables
from clora_kernels.kernels.routed_lora.algebra import Projection
from clora_kernels.kernels.routed_lora.tables import Call, Ratio, Stamp, Table, Verdict
from clora_kernels.kernels.routed_lora.tiles import Key, LinearTile, ReduceTile, ShrinkTile, Tuned, bucket, rows_of

triton = pytest.importorskip("triton", reason="a table says of Triton's kernels")

KEYS = {
    Key("linear", 0, "fp32", 40, 48, 16, 0, tma=True): Tuned(LinearTile(32, 16, 16), 0.5, 1.0, {"some tile": "spills"}),
    Key("shrink", 0, "fp32", 0, 48, 16, 0): Tuned(ShrinkTile(32, 16), 0.5, 1.0),
    Key("reduce", 0, "fp32", 0, 48, 16, 0): Tuned(ReduceTile(32, 16), 0.5, 1.0),
}
CALL = Call("fp32", 48, (40,), 16, 0, "")
FAST = Ratio(16, (0.9, 0.8, 0.95), (0.9, 0.8, 0.95))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLORA_TABLES", str(tmp_path / "tables"))
    forget(monkeypatch)
    return tmp_path / "tables"


@pytest.fixture
def stamp(device):
    return tables.stamp_of(torch.empty(0, device=device).device)


def table(stamp, wins=True):
    return Table(stamp, dict(KEYS), {CALL: Verdict(wins, (FAST,))})


def inputs(device):
    return made((16,), 48, 40, 4, routing=False, device=device)


def test_what_is_saved_is_read(folder, stamp):
    path = table(stamp).save(folder)
    found = tables.read(path)
    assert (found.stamp, found.tiles) == (stamp, KEYS)
    assert found.calls == {CALL: Verdict(True, (FAST,), path.name)}
    assert [file.name for file in folder.iterdir()] == [path.name], "nothing is left beside it"
    assert len(path.read_text().splitlines()) == 4 + len(KEYS) + 2 + 1 + 2, "one line an entry, to be read by people"
    assert Table(stamp).save(folder) == path and not tables.read(path).tiles


def test_a_table_that_cannot_be_written_stays(folder, stamp, monkeypatch):
    path = table(stamp).save(folder)
    before = path.read_text()
    whole = Path.write_text

    def half(self, text):
        whole(self, text[: len(text) // 2])
        raise OSError("full")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="full"):
        table(stamp, wins=False).save(folder)
    assert path.read_text() == before


def spoiled(content, path, value):
    """The file with one entry, by its path, replaced, or removed."""
    *way, last = path
    target = content
    for step in way:
        target = target[step]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return content


SPOILED = {
    "an older format": (("format",), 0, "format 0, and this version of clora_kernels reads format 1"),
    "a later format": (("format",), 2, "format 2"),
    "no format": (("format",), None, "no table: it has no format"),
    "more than a table": (("more",), 1, "the file: got"),
    "no calls": (("calls",), None, "the file: got"),
    "calls that are no list": (("calls",), {}, "calls: got"),
    "a stamp without a device": (("stamp", "device"), None, "stamp: got"),
    "a version that is a number": (("stamp", "triton"), 3.7, "stamp.triton: got 3.7, expected str"),
    "another op": (("tiles", 0, "key", "op"), "pack", "tiles[0].key.op: got 'pack'"),
    "a tile of another op": (("tiles", 0, "key", "op"), "shrink", "tiles[0].tile: got"),
    "a size that is text": (("tiles", 1, "key", "K"), "48", "tiles[1].key.K: got '48', expected int"),
    "a block that is no power of two": (("tiles", 0, "tile", "block_n"), 24, "tiles[0].tile.block_n: got 24"),
    "a block too small": (("tiles", 0, "tile", "block_k"), 8, "tiles[0].tile.block_k: got 8"),
    "a block too large": (("tiles", 0, "tile", "block_k"), 2048, "tiles[0].tile.block_k: got 2048"),
    "no warps": (("tiles", 0, "tile", "num_warps"), 0, "tiles[0].tile.num_warps: got 0"),
    "a flag that is a number": (("tiles", 0, "key", "dropout"), 1, "tiles[0].key.dropout: got 1, expected bool"),
    "seconds that are text": (("tiles", 0, "seconds"), "fast", "tiles[0].seconds: got 'fast'"),
    "a reason that is a number": (("tiles", 0, "dropped"), {"tile": 1}, "tiles[0].dropped.tile: got 1"),
    "a verdict that is text": (("calls", 0, "wins"), "yes", "calls[0].wins: got 'yes', expected bool"),
    "a call without rows": (("calls", 0, "call", "bucket"), None, "calls[0].call: got"),
    "two of three figures": (("calls", 0, "ratios", 0, "both"), [1.0, 1.0], "calls[0].ratios[0].both: got 2 entries"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_file_that_is_no_table_is_refused_and_breaks_nothing(device, folder, stamp, case):
    path, value, message = SPOILED[case]
    file = table(stamp).save(folder)
    file.write_text(json.dumps(spoiled(json.loads(file.read_text()), path, value)))
    with pytest.raises(ValueError) as error:
        tables.read(file)
    assert message in str(error.value)
    if case in ("a later format", "two of three figures"):
        with pytest.warns(RuntimeWarning, match=re.escape(f"{file}: this table of tiles is not used: {message}")):
            y = routed_lora_linear(**inputs(device))
        assert y.shape == (16, 40)
        gated = {**inputs(device), "gate": torch.ones(4, device=device)}
        assert f"{file.name} is not used: {message}" in explain(routed_lora_linear, **gated).reason
        (entry,) = info().tables
        assert (entry.name, entry.available) == (file.name, False) and message in entry.reason


@pytest.mark.parametrize("text", ["", "[]", "null", "\0", '{"format": 1', "\udce9"])
def test_a_file_of_anything(device, folder, text):
    folder.mkdir()
    (folder / "broken.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (folder / "a-folder.json").mkdir()
    with pytest.warns(RuntimeWarning) as warned:
        routed_lora_linear(**inputs(device))
    assert {name for w in warned for name in ("broken.json", "a-folder.json") if name in str(w.message)} == {
        "broken.json", "a-folder.json",
    }  # fmt: skip
    routed_lora_linear(**inputs(device))  # said once


@pytest.mark.parametrize("field", ["device", "capability", "triton", "torch", "clora_kernels"])
def test_a_table_of_another_machine_is_left_alone(device, folder, stamp, field):
    """Quietly: a home may be shared by many machines."""
    values = {name: getattr(stamp, name) for name in Stamp.__dataclass_fields__}
    path = table(Stamp(**{**values, field: "another"})).save(folder)
    call = {**inputs(device), "gate": torch.ones(4, device=device)}
    why = f"made for {field} another, here {values[field]}"
    choice = explain(routed_lora_linear, **call)
    assert choice.backend == "aten" and f"{path.name} is not used: {why}" in choice.reason
    (entry,) = info().tables
    assert not entry.available and entry.reason == why
    assert not tables.table_of(call["x"]).tiles


def test_what_the_user_measured_goes_before_what_ships(device, folder, stamp, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "package" / "tables.py"))
    table(stamp, wins=True).save(tmp_path / "package" / "shipped")
    assert explain(routed_lora_linear, **inputs(device)).backend == "triton"
    assert [entry.reason for entry in info().tables] == ["3 tiles, 1 calls, 1 of them faster on triton"]
    table(stamp, wins=False).save(folder)
    forget(monkeypatch)
    assert explain(routed_lora_linear, **inputs(device)).backend != "triton"
    assert tables.table_of(inputs(device)["x"]).tiles == KEYS


def test_a_win_counts_only_where_triton_can_run(device, folder, stamp, monkeypatch):
    table(stamp).save(folder)
    monkeypatch.setattr("clora_kernels.dispatch.routed_lora.why_not_triton", lambda *args: "it is broken")
    assert explain(routed_lora_linear, **inputs(device)).backend != "triton"


def test_without_the_interpreter_no_file_is_read_for_a_cpu(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)  # which sets the environment too, and both back
    monkeypatch.setattr(tables, "files", None)
    x = torch.empty(2, 3)
    assert not tables.table_of(x).calls and tables.table_of(x) is tables.table_of(x)
    assert tables.table_of(x).silence == "ATen matmuls are proved on cpu"
    assert tables.stamp_of(x.device) is None and tables.stamp_of(torch.device("meta")) is None


def test_where_tables_lie(monkeypatch):
    assert tables.user_folder().name == "tables"
    monkeypatch.delenv("CLORA_TABLES")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(tables.user_folder()) == "/somewhere/clora_kernels/tables"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(tables.user_folder()).endswith("/.cache/clora_kernels/tables")
    monkeypatch.setenv("CLORA_TABLES", "/somewhere/that/is/not/there")
    assert tables.files() == [] and info().tables == []
    assert "\ntables of tiles: none in /somewhere/that/is/not/there; " in str(info())


def test_no_table_names_itself():
    stamp = Stamp("NVIDIA H100 80GB HBM3", "9.0", "3.7.1", "2.13.0+cu130", "0.1.0")
    assert stamp.file_name == "nvidia-h100-80gb-hbm3-0.1.0-triton-3.7.1-torch-2.13.0+cu130.json"


def ratio(forward, both, M=16):
    return Ratio(M, forward, both)


WON, TIE, LOST = (0.9, 0.8, 0.95), (0.99, 0.9, 1.01), (1.1, 1.0, 1.2)


@pytest.mark.parametrize(
    "wins, ratios",
    [
        (True, [ratio(WON, WON)]),
        (True, [ratio(TIE, WON, 1), ratio(WON, WON)]),
        (False, [ratio(WON, TIE)]),
        (False, [ratio(LOST, WON)]),
        (False, [ratio(WON, WON, 1), ratio(WON, LOST)]),
        (False, [ratio(WON, LOST, 1), ratio(WON, WON)]),
    ],
)
def test_a_win_is_one_beyond_the_spread_at_both_ends(wins, ratios):
    assert Verdict.of(tuple(ratios)).wins == wins


def test_calls_are_told_apart_by_what_large_kernels_do(device):
    def projection(**given):
        made_ = dict.fromkeys(Projection._fields) | {
            "weight": torch.empty(40, 48), "lora_A": torch.empty(5, 48), "lora_B": torch.empty(40, 5),
            "scaling": torch.tensor(1.0),
        }  # fmt: skip
        return Projection(**{**made_, **given})

    t, plain = torch.empty(3), projection()
    assert tables.call_of(torch.bfloat16, 100, [plain]) == Call("bf16", 48, (40,), 16, 3, "")
    same = {"bias": t, "gate": t, "routing": t, "scaling": t, "base_output": t}
    assert tables.call_of(torch.float16, 1, [projection(**same)]).options == ""
    for given, option in {"threshold": "dropout", "frozen_routing": "frozen", "routing_index": "bank"}.items():
        assert tables.call_of(torch.float32, 1, [plain, projection(**{given: t})]).options == option
    assert tables.call_of(torch.float32, 1, [projection(frozen_routing=t, threshold=t)]).options == "frozen+dropout"
    assert tables.call_of(torch.float32, 1, [projection(weight=None)]).options == "delta"
    assert tables.call_of(torch.float32, 1, [projection(weight=torch.empty(48, 40).mT)]).options == "transposed"
    two = [plain, projection(lora_A=torch.empty(70, 48), lora_B=torch.empty(8, 70))]
    assert tables.call_of(torch.float32, 1, two) == Call("fp32", 48, (40, 8), 128, 0, "")
    assert tables.call_of(torch.float64, 1, [plain]).dtype == ""


def test_the_ends_of_a_bucket():
    for b in range(11):
        fewest, most = rows_of(b)
        assert bucket(fewest) == bucket(most) == b and (b == 0 or bucket(fewest - 1) == b - 1)
        assert b == 10 or bucket(most + 1) == b + 1
    assert [rows_of(b) for b in (0, 1, 9, 10)] == [(1, 16), (17, 32), (4097, 8192), (8193, 16384)]
