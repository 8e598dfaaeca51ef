"""The tune command: it proves before it times, saves as it goes, and goes on where it was left."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tuning import DEFAULTS, aten_wins, fresh, own_table, rig, triton_wins, tune

from clora_kernels.__main__ import main
from clora_kernels.kernels.routed_lora import tables, tiles
from clora_kernels.kernels.routed_lora.candidates import candidates
from clora_kernels.kernels.routed_lora.tiles import Key, LinearTile, ReduceTile, ShrinkTile
from clora_kernels.testing import launches
from clora_kernels.tune import command, problem, search

pytest.importorskip("triton", reason="the kernels are Triton's")

from clora_kernels.kernels.routed_lora import aten
from clora_kernels.kernels.routed_lora import triton as kernels


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    return fresh(tmp_path, monkeypatch)


PLANTED = {
    "linear": LinearTile(16, 16, 16, group_m=7),
    "shrink": ShrinkTile(16, 16, per_sm=7),
    "reduce": ReduceTile(24, 16),
}


def plant(monkeypatch, op, wrong):
    """A candidate of ``op`` with which it computes what ``wrong`` makes of the result, timed as the fastest."""
    right = getattr(kernels, op)
    monkeypatch.setattr(
        search, "candidates", lambda key: [tiles.default(key), *([PLANTED[op]] if key.op == op else [])]
    )

    def primitive(*args):
        (table,) = tables._LOADED.values()
        result = right(*args)
        return wrong(result, *args) if any(t.tile == PLANTED[op] for t in table.tiles.values()) else result

    monkeypatch.setattr(kernels, op, primitive)
    rig(monkeypatch, lambda name: (0.1, 0.1) if name in map(str, PLANTED.values()) else (1.0, 1.0))


def unwritten(found, *_):
    """The last row of each output stays as it was allocated."""
    out = [tuple(None if t is None else torch.empty_like(t) for t in pair) for pair in found]
    for pair, into in zip(found, out, strict=True):
        for t, u in zip(pair, into, strict=True):
            if t is not None:
                u[:-1] = t[:-1]
    return out


def without_small_adapters(y, products, low_rank, *rest):
    """As a sum does that is rounded before the adapter comes."""
    ((q, C, _),) = low_rank
    adapter = q @ C
    return y - adapter if adapter.abs().max() < 0.3 else y


@pytest.mark.parametrize(
    "op, wrong, why",
    [
        ("linear", lambda y, *_: y * 1.001, "wrong results: beyond the error that rounding explains"),
        ("linear", without_small_adapters, "wrong results: adapter fidelity"),
        ("shrink", unwritten, "elements are not finite"),
        ("reduce", lambda found, *_: found, "Error"),  # 24 is no power of two
    ],
)
def test_a_candidate_that_is_wrong_is_refused(device, monkeypatch, capsys, op, wrong, why):
    plant(monkeypatch, op, wrong)
    assert tune(device) == 0
    said, table = capsys.readouterr().out, own_table(device)
    assert why in said and str(PLANTED[op]) in said and ("REFUSED" in said) == (op != "reduce")
    assert not [tuned for tuned in table.tiles.values() if tuned.tile == PLANTED[op]] and len(table.tiles) == 6
    reasons = [tuned.dropped for key, tuned in table.tiles.items() if key.op == op]
    assert all(why in reason[str(PLANTED[op])] for reason in reasons)


@pytest.mark.parametrize("backend", ["triton", "aten"])
def test_a_backend_that_is_wrong_is_not_timed(device, monkeypatch, capsys, backend):
    module = kernels if backend == "triton" else aten
    right, met = module.linear, rig(monkeypatch, triton_wins)
    monkeypatch.setattr(module, "linear", lambda *args: right(*args) * 1.001)
    assert tune(device) == 1 and not met
    said = capsys.readouterr().out
    assert f"REFUSED {backend}: AssertionError: beyond the error" in said and "please report it" in said
    assert not own_table(device).tiles and not own_table(device).calls


@pytest.mark.parametrize("rounds, stays", [([0.9, 0.9, 0.9, 1.1, 1.1], True), ([0.9, 0.9, 0.9, 0.9, 1.1], False)])
def test_the_default_stays_unless_another_is_faster_beyond_the_spread(device, monkeypatch, rounds, stays):
    rig(monkeypatch, lambda name: (1.0, 1.0) if name in DEFAULTS or name in ("triton", "aten") else (rounds, rounds))
    assert tune(device) == 0
    table = own_table(device)
    assert len(table.tiles) == 6 and not any(verdict.wins for verdict in table.calls.values())
    assert {tuned.tile == tiles.default(key) for key, tuned in table.tiles.items()} == {stays}


@pytest.mark.parametrize("N, keys, launches_a_key", [(40, 6, 1), (48, 3, 2)])
def test_a_key_is_timed_with_the_launches_that_ask_for_it(device, N, keys, launches_a_key):
    """In a square layer forward and backward ask alike."""
    of = problem.Problem(tables.Call("fp32", 48, (N,), 16, 0, ""), device)
    table = tables.Table(None)
    tables.use(of.x.device, table)
    before = table.tiles
    found = search.asked(of, table)
    assert [len(calls) for calls in found.values()] == [launches_a_key] * keys
    assert {key.op for key in found} == {"linear", "shrink", "reduce"} and table.tiles is before
    for key, calls in found.items():
        with launches() as names:
            calls[0]()
        assert {name.split("_")[0] for name in names} == {key.op}


def test_a_call_that_does_not_fit_is_left_out(device, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("no 40 GiB are left\nand more")

    monkeypatch.setattr(kernels, "linear", full)
    assert tune(device) == 0
    assert "left out, it does not fit the memory: no 40 GiB are left\n" in capsys.readouterr().out
    monkeypatch.setattr(kernels, "linear", lambda *args: torch.ones(2) @ torch.ones(3))
    assert tune(device) == 1 and "REFUSED triton: RuntimeError: " in capsys.readouterr().out


def test_a_candidate_that_spills_is_dropped(monkeypatch):
    from clora_kernels.kernels.routed_lora.triton import linear_kernels

    loaded = {"before": SimpleNamespace(n_spills=99)}
    monkeypatch.setattr(
        linear_kernels, "some_kernel", SimpleNamespace(device_caches={0: (loaded, None)}), raising=False
    )
    for spills, why in ((17, "spills 17 registers a thread"), (16, ""), (None, "")):
        loaded.pop("new", None)
        new = SimpleNamespace(n_spills=spills)
        compiling = SimpleNamespace(check=lambda backend, new=new: loaded.update(new=new))
        assert search.Search._why_not(None, compiling) == why


def test_what_is_done_is_left_out(device, monkeypatch, capsys):
    met = rig(monkeypatch, triton_wins)
    assert tune(device, "--seconds", "0") == 0
    assert "the time is up: 0 of 1 calls are done" in capsys.readouterr().out and not met and own_table(device)
    assert tune(device) == 0
    first, before = len(met), own_table(device)
    with monkeypatch.context() as patch:
        patch.setattr(search, "Problem", None)  # nothing is built
        assert tune(device) == 0
    assert len(met) == first and "1 calls are in the table already" in capsys.readouterr().out
    rig(monkeypatch, aten_wins)
    assert tune(device, "--again") == 0
    after = own_table(device)
    assert before.calls.keys() == after.calls.keys() and before.tiles.keys() == after.tiles.keys()
    assert not any(verdict.wins for verdict in after.calls.values())


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, 130), (search.TimeUp, 0)])
def test_an_interruption_leaves_a_whole_table(device, monkeypatch, capsys, error, status):
    def third(name):
        if len(met) == 3:
            raise error
        return triton_wins(name)

    met = rig(monkeypatch, third)
    assert tune(device) == status
    assert "the same command goes on from here" in capsys.readouterr().out
    table = own_table(device)
    assert len(table.tiles) == 2 and not table.calls
    assert tables.table_of(torch.empty(0, device=device)).tiles == table.tiles, "no trial is left in it"
    met = rig(monkeypatch, triton_wins)
    assert tune(device) == 0 and len(met) == 4 + 2
    assert len(own_table(device).tiles) == 6


def test_another_folder_and_a_file_that_is_no_table(device, monkeypatch, capsys, tmp_path):
    rig(monkeypatch, triton_wins)
    assert tune(device, "--output", str(tmp_path / "elsewhere"), "--seconds", "0") == 0
    assert f"CLORA_TABLES={tmp_path / 'elsewhere'}" in capsys.readouterr().out
    (path,) = (tmp_path / "elsewhere").glob("*.json")
    path.write_text("{")
    assert tune(device, "--output", str(tmp_path / "elsewhere")) == 2
    assert f"{path}: no JSON" in capsys.readouterr().err and path.read_text() == "{"
    (tmp_path / "file").write_text("")
    assert tune(device, "--output", str(tmp_path / "file" / "below")) == 2


def test_where_it_cannot_run_it_says_so(monkeypatch, capsys):
    assert main(["tune", "--device", "meta"]) == 2
    assert "--device meta: its kernels run on NVIDIA GPUs, not on meta" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["tune"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("clora_kernels tune: --device cuda: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "wrong", ["--shapes 48", "--shapes 48,0", "--rank 300", "--rank 0", "--rows 0", "--dtype fp64"]
)
def test_wrong_arguments(capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *wrong.split()])
    assert stop.value.code == 2 and wrong.split()[0] in capsys.readouterr().err


def test_the_plan_begins_with_what_is_worth_most():
    options = SimpleNamespace(
        shapes=None, rows=None, dtype=["bf16"], rank=[8, 16], options=["plain", "dropout", "frozen"]
    )
    calls = list(command.plan(options, on_cpu=False))
    assert calls[0] == ("bf16", 4096, (4096,), 16, 9, "")
    assert len(calls) == len(set(calls)) == 11 * 3 * len(command.SHAPES), "ranks 8 and 16 are padded alike"
    assert {call.bucket for call in calls} == set(range(11))
    assert [call.options for call in calls[:: len(command.SHAPES)][:3]] == ["", "dropout", "frozen"]


def test_candidates_are_few_and_begin_with_the_default():
    for op, kind in {"linear": LinearTile, "shrink": ShrinkTile, "reduce": ReduceTile}.items():
        for capability in (0, 80, 90):
            for dtype in ("fp32", "bf16", "fp16"):
                for r, bucket, dropout, tma in ((16, 0, False, False), (256, 9, True, True), (16, 9, False, True)):
                    key = Key(op, capability, dtype, 4096, 4096, r, bucket, 1, dropout, tma)
                    found = candidates(key)
                    assert found[0] == tiles.default(key) and 2 <= len(found) == len(set(found)) <= 16
                    assert all(type(tile) is kind for tile in found)


def test_problems_are_proved_on_rows_that_no_block_divides(device):
    for bucket, rows in ((0, 15), (2, 63)):
        made_ = problem.Problem(tables.Call("fp16", 48, (24,), 16, bucket, "frozen"), device)
        assert made_.M == rows + 1 and made_._expected.truth["y"].shape == (rows, 24)
        assert made_._expected.truth.keys() == {"y", "x", "lora_A.0", "lora_B.0", "routing.0"}
    with launches() as names:
        made_.check("triton")
    assert names.count("pack_kernel") == 3, "forward, backward, and forward with a small adapter"


@pytest.mark.skipif(torch.cuda.is_available(), reason="under the interpreter the clock does not matter")
def test_the_command_interrupted_and_run_again(folder):
    """A process of its own, with its clock: Ctrl-C at the second tile, then to the end."""
    command = [
        sys.executable,
        "-m",
        "clora_kernels",
        "tune",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--options",
        "plain",
    ]
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heeding)
    with running.stdout as output:
        timed = (line for line in output if " timed" in line)
        next(timed), next(timed)  # the first is saved then
        running.send_signal(signal.SIGINT)
        said = output.read()
    assert running.wait(60) == 130 and "interrupted: 0 of 1 calls are done" in said
    assert 1 <= len(own_table(torch.device("cpu")).tiles) < 6
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "auto takes aten" in done.stdout, done.stderr
    assert len(own_table(torch.device("cpu")).tiles) == 6
