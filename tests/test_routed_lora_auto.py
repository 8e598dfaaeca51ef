"""`auto` takes triton where a table of this device says that it wins, forward and backward, and nowhere else."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from strategies import call, dy_for, laid_out, made
from tuning import aten_wins, forget, fresh, own_table, rig, small, triton_wins, tune

from clora_kernels import RoutedLoRA, explain, routed_lora_linear, routed_lora_linear_group
from clora_kernels.kernels.routed_lora import tables, tiles
from clora_kernels.kernels.routed_lora.candidates import candidates
from clora_kernels.testing import assert_parity, dispatched, evaluate

pytest.importorskip("triton", reason="a table says of Triton's kernels")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    return fresh(tmp_path, monkeypatch)


def test_auto_takes_what_the_table_says(device, monkeypatch, capsys):
    met = rig(monkeypatch, triton_wins)
    assert tune(device) == 0
    said, table = capsys.readouterr().out, own_table(device)
    assert met[-2:] == [["triton", "aten"]] * 2, "both ends of the bucket"
    assert len(table.tiles) == len(met) - 2 == 6 and "auto takes triton" in said
    for key, tuned in table.tiles.items():
        assert tuned.tile == candidates(key)[1] and (tuned.seconds, tuned.default_seconds) == (0.5, 2.0)
    ((_, verdict),) = table.calls.items()
    assert verdict.wins and [ratio.M for ratio in verdict.ratios] == [1, 16]
    forget(monkeypatch)
    inputs = small(device)
    choice = explain(routed_lora_linear, **inputs)
    assert choice.backend == "triton" and tables.stamp_of(inputs["x"].device).file_name in choice.reason
    assert "forward + backward 0.900" in choice.reason
    assert tables.table_of(inputs["x"]).tiles == table.tiles
    with dispatched() as ran:
        assert_parity(call, inputs, dy=dy_for(inputs))
    assert ran and all(name.startswith("routed_lora.triton.") for name in ran)
    assert "shrink_sums_kernel" not in ran


@pytest.mark.parametrize("dynamic, dropout_p", [(False, 0.0), (True, 0.3)])
def test_auto_in_a_compiled_graph(device, monkeypatch, dynamic, dropout_p):
    """The operators choose when they run, forward and backward alike, other rows than those the graph was made with."""
    rig(monkeypatch, triton_wins)
    assert tune(device, options="dropout" if dropout_p else "plain") == 0
    forget(monkeypatch)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows, backend in ((16, "triton"), (7, "triton"), (40, "aten")):
        inputs = small(device, rows, scaling=None, gate=(4,), dropout_p=dropout_p)
        dy, wanted = dy_for(inputs), ("x", "lora_A", "lora_B")
        with dispatched() as ran:
            found = evaluate(compiled, inputs, dy, wanted)
        assert {name.split(".")[1] for name in ran} == {backend} and len(ran) > 5, "forward and backward"
        eager = evaluate(partial(call, backend=backend), inputs, dy, wanted)
        assert all(torch.equal(found[name], eager[name]) for name in eager)


def test_auto_takes_aten_where_the_table_is_silent(device, monkeypatch):
    rig(monkeypatch, triton_wins)
    assert tune(device) == 0
    forget(monkeypatch)
    same = {
        "scaling": small(device, scaling=-0.3),
        "rank in the same block": small(device, r=16),
        "gate and bias": small(device, gate=(4,)),
        "routing": made((16,), 48, 40, 4, device=device),
        "one row": small(device, rows=1),
        "leading dims": made((2, 7), 48, 40, 4, routing=False, device=device),
    }
    other = {
        "rows": small(device, rows=17),
        "N": small(device, N=41),
        "rank": small(device, r=17),
        "dtype": small(device, dtypes="bf16+fp32"),
        "dropout": small(device, dropout_p=0.1),
        "frozen": made((16,), 48, 40, 4, frozen=True, device=device),
        "bank": made((16,), 48, 40, 4, bank=2, device=device),
        "transposed": small(device) | {"weight": laid_out(small(device)["weight"], "transposed")},
    }
    assert {name: explain(routed_lora_linear, **inputs).backend for name, inputs in same.items()} == dict.fromkeys(
        same, "triton"
    )
    choices = {name: explain(routed_lora_linear, **inputs) for name, inputs in other.items()}
    assert not {name for name, choice in choices.items() if choice.backend == "triton"}
    assert "does not know this call" in choices["bank"].reason
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert explain(routed_lora_linear, **same["one row"]).backend != "triton", "ATen was not measured with tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_auto_takes_aten_where_it_is_faster(device, monkeypatch, capsys):
    rig(monkeypatch, aten_wins)
    assert tune(device, options="frozen+dropout") == 0
    assert "auto takes aten" in capsys.readouterr().out
    assert all(tuned.tile == tiles.default(key) for key, tuned in own_table(device).tiles.items()), "as fast: it stays"
    forget(monkeypatch)
    choice = explain(routed_lora_linear, **made((16,), 48, 40, 4, frozen=True, dropout_p=0.2, device=device))
    assert choice.backend == "aten" and "forward + backward 1.100 with 16 rows" in choice.reason


def test_a_group_is_a_call_of_its_own(device, monkeypatch):
    met = rig(monkeypatch, triton_wins)
    assert tune(device, shapes="48,40+24", options="dropout") == 0
    assert len(met) == 9 + 2, "x is read once, each dy once; one dx"
    forget(monkeypatch)
    x, layers = small(device)["x"], [small(device, N=N, bias=False, dropout_p=0.1) for N in (40, 24)]
    group = [RoutedLoRA(**{k: v for k, v in layer.items() if k != "x"}) for layer in layers]
    assert explain(routed_lora_linear_group, x, group).backend == "triton"
    with dispatched() as ran:
        ys = routed_lora_linear_group(x.requires_grad_(), [layer._replace(dropout_seed=None) for layer in group])
        torch.autograd.grad(ys, x, [torch.ones_like(y) for y in ys])
    assert {name.split(".")[1] for name in ran} == {"triton"} and len(ran) > 8
    state = torch.random.get_rng_state()
    explain(routed_lora_linear, **{**layers[0], "dropout_seed": None})
    assert torch.equal(torch.random.get_rng_state(), state), "nothing is drawn for an explanation"
    assert explain(routed_lora_linear_group, x, group, training=False).backend == "aten", "then nothing drops"
    assert explain(routed_lora_linear_group, x, group[::-1]).backend == "aten"
    assert explain(routed_lora_linear, **layers[0]).backend != "triton"
