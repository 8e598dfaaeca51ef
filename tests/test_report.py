"""info(), explain() and the command line: they tell what is true here."""

import importlib.metadata
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import clora_kernels as ck
from clora_kernels import RoutedLoRA, RoutedLoRALinear, extension
from clora_kernels.__main__ import main
from clora_kernels.dispatch import routed_lora as routed_lora_dispatch
from clora_kernels.dispatch.choice import BACKENDS
from clora_kernels.kernels import cpu_matmul
from clora_kernels.selftest import Case, SelftestReport, _check, selftest
from clora_kernels.testing import dispatched

X, W, A, B = torch.randn(2, 3, 8), torch.randn(6, 8), torch.randn(4, 8), torch.randn(6, 4)


def test_info_tells_versions_devices_parts_and_backends(device):
    info = ck.info()
    assert info.versions["torch"] == torch.__version__ and info.versions["clora_kernels"] == ck.__version__
    assert [part.name for part in info.parts] == ["cpu", "cuda"]
    for part, status in zip(info.parts, extension.status(), strict=True):
        assert part.available == (status.state == "loaded") and status.detail in part.reason
    backends = {b.name: b for b in info.backends["routed_lora"]}
    assert set(backends) == {*BACKENDS, "composite"} - {"auto"}
    for name, backend in backends.items():
        tensors = [t.to("cpu" if name == "native" else device) for t in (X, W, A, B)]
        assert backend.reason
        if backend.available:
            assert ck.explain(ck.routed_lora_linear, *tensors, backend=name).backend == name
        else:
            with pytest.raises(ValueError, match=f"backend='{name}' cannot run routed_lora: "):
                ck.routed_lora_linear(*tensors, backend=name)
    assert all(line in str(info) for line in (torch.__version__, "routed_lora", "compiled parts"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_explain_names_what_then_runs(dtype):
    x, w = X.to(dtype), W.to(dtype)
    layer = RoutedLoRALinear(8, 6, 4, dtype=dtype)
    calls = [
        (ck.routed_lora_linear, (x, w, A, B), {"dropout_p": 0.5}),
        (ck.routed_lora_linear_group, (x, [RoutedLoRA(w, A, B), RoutedLoRA(w, A, B)]), {}),
        (ck.routed_lora_delta, (x, A, B), {"base_output": torch.zeros(2, 3, 6)}),
        (layer, (x,), {}),
    ]
    chosen = []
    for fn, args, kwargs in calls:
        choice = ck.explain(fn, *args, **kwargs)
        assert choice.strategy and choice.reason in str(choice)
        with dispatched() as ran:
            fn(*args, **kwargs)
        module = {"native": "layer"}.get(choice.backend, choice.backend)
        assert ran and all(call.startswith(f"routed_lora.{module}.") for call in ran)
        chosen.append(choice.backend)
    compiled = extension.has_op("routed_lora_lay_down", "cpu") and dtype != torch.float64
    of_bf16 = ["native" if compiled else "aten", "aten", "aten"]
    assert chosen[:3] == (["composite"] * 3 if dtype == torch.float32 and X.device.type == "cpu" else of_bf16)
    strategy = ck.explain(*calls[0][:1], *calls[0][1], backend="aten").strategy
    assert ("accumulates on it in fp32" in strategy) == (dtype == torch.bfloat16)
    assert "base_output" in ck.explain(calls[2][0], *calls[2][1], **calls[2][2], backend="aten").strategy


def test_explain_checks_arguments_and_runs_nothing():
    with dispatched() as ran:
        with pytest.raises(ValueError, match="lora_B: got shape"):
            ck.explain(ck.routed_lora_linear, X, W, A, B.mT)
        with pytest.raises(TypeError, match="fn: got"):
            ck.explain(torch.relu, X)
        with pytest.raises(TypeError):
            ck.explain(ck.routed_lora_linear, X)
        assert ck.explain(ck.routed_lora_linear, X, W, A, B, backend="reference").backend == "reference"
        state = torch.get_rng_state()
        ck.explain(ck.routed_lora_linear, X, W, A, B, dropout_p=0.5)
        assert torch.equal(torch.get_rng_state(), state), "no seed is drawn for an explanation"
    assert not ran


def test_explain_checks_as_the_call_itself_does():
    """The same error, word for word, from explain and from the call."""
    training, merged = RoutedLoRALinear(8, 6, 4), RoutedLoRALinear(8, 6, 4)
    for layer in (training, merged.eval()):
        layer.merge()
    adapter = RoutedLoRA(W, A, B)
    for fn, args, kwargs in (
        (ck.routed_lora_linear_group, (X, [3]), {}),
        (ck.routed_lora_linear_group, (X, []), {}),
        (ck.routed_lora_linear_group, (X, 3), {}),
        (ck.routed_lora_linear_group, (X, [adapter, RoutedLoRA(W, A, B.mT)]), {}),
        (ck.routed_lora_linear, (X, W, A, B), {"training": "yes"}),
        (ck.routed_lora_linear, (X, None, A, B), {}),
        (ck.routed_lora_delta, (X, A, B), {"base_output": X}),
        (ck.dropout_mask, (X, 2.0, torch.tensor(0)), {}),
        (ck.dropout_mask, (X, 0.5, None), {}),
        (training, (X,), {}),
        (merged, (X,), {"gate": torch.ones(4)}),
        (RoutedLoRALinear(8, 6, 4), (X,), {"gate": torch.ones(5)}),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError)) as called:
            fn(*args, **kwargs)
        with pytest.raises(called.type, match=re.escape(str(called.value))):
            ck.explain(fn, *args, **kwargs)
    with pytest.raises(TypeError):
        ck.explain(training.unmerge() or training, X, torch.ones(4))


def test_explain_and_info_know_the_mask(monkeypatch):
    seed = torch.tensor(1)
    built = extension.has_op("dropout_mask", "cpu")
    assert ck.explain(ck.dropout_mask, X, 0.5, seed).backend == ("native" if built else "reference")
    backends = {b.name: b.available for b in ck.info().backends["dropout_mask"]}
    assert backends["reference"] and backends["native (cpu)"] == built
    monkeypatch.setattr(extension, "has_op", lambda name, device_type: False)
    assert ck.explain(ck.dropout_mask, X, 0.5, seed).backend == "reference"


def test_explain_a_merged_layer():
    layer = RoutedLoRALinear.from_linear(nn.Linear(8, 6), 4).eval()
    layer.merge()
    assert "merged" in ck.explain(layer, X).reason


def test_selftest_passes_here_and_fails_when_the_operation_is_wrong(monkeypatch):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = selftest(device, seconds=300)
    assert report.ok and len(report.cases) == 33 and len(report.ratios) == 6, str(report)
    assert all(ratio > 0 for ratio in report.ratios.values())
    right = ck.routed_lora_linear
    monkeypatch.setattr("clora_kernels.selftest.routed_lora_linear", lambda *a, **k: right(*a, **{**k, "scaling": 0.8}))
    wrong = selftest(device)
    assert [case.ok for case in wrong.cases] == 3 * ([False] * 6 + [True] * 5) and not wrong.ratios
    assert "18 failed" in str(wrong)


def test_selftest_fails_when_rank1_experts_are_wrong(monkeypatch):
    right = ck.rank1_experts
    monkeypatch.setattr("clora_kernels.selftest.rank1_experts", lambda **k: right(**{**k, "scaling": 1.75}))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cases = [case for case in _check(dtype, torch.device("cpu")) if "experts" in case.name]
        assert len(cases) == 3 and not any(case.ok for case in cases)


@pytest.mark.parametrize(
    ("wrong", "failing"),
    [
        (lambda Q, R, rank: (Q * 1.01, R / 1.01, rank), ["hard matrices", "gradients"]),
        (lambda Q, R, rank: (Q, R, rank + 1), ["hard matrices", "gradients"]),
        (lambda Q, R, rank: (Q.detach() + 1.02 * (Q - Q.detach()), R, rank), ["gradients"]),
    ],
)
def test_selftest_fails_when_gram_schmidt_is_wrong(wrong, failing, monkeypatch):
    """A Q that is too long, another rank, a gradient that is 2 % too large."""
    right = ck.gram_schmidt
    monkeypatch.setattr("clora_kernels.selftest.gram_schmidt", lambda *a: ck.GramSchmidtResult(*wrong(*right(*a))))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cases = {case.name.split(", ")[1]: case for case in _check(dtype, torch.device("cpu")) if "gram" in case.name}
        assert [name for name, case in cases.items() if not case.ok] == failing
        assert all("AssertionError" in cases[name].detail for name in failing)


def test_selftest_checks_everything_and_times_what_its_seconds_allow(monkeypatch):
    clock = [0]

    def measure(fn, backward, device):
        """The layer takes as many seconds as measurements were made by then, the frozen linear two."""
        clock[0] += 1
        return clock[0] if fn.__name__ == "ours" else 2.0

    monkeypatch.setattr("clora_kernels.selftest._check", lambda dtype, device: [Case(str(dtype), True, "")])
    monkeypatch.setattr("clora_kernels.selftest._seconds", measure)
    monkeypatch.setattr("clora_kernels.selftest.time", SimpleNamespace(monotonic=lambda: clock[0]))
    report = selftest(torch.device("cpu"), seconds=2 * 8 + 5)
    assert len(report.cases) == 3 and clock[0] == 22, "a round is two measurements, the eleventh the last to begin"
    assert list(report.ratios.values()) == [9 / 2, 20 / 2, *[None] * 4], "medians but for the first round"
    assert str(report).count("left out: the time was up") == 4
    late = selftest(torch.device("cpu"), seconds=0)
    assert len(late.cases) == 3 and list(late.ratios.values()) == [None] * 6 and clock[0] == 22
    one_round = selftest(torch.device("cpu"), seconds=1)
    assert list(one_round.ratios.values()) == [None] * 6 and clock[0] == 24, "the first round warms up"
    assert str(SelftestReport("cpu", [], {"a / b": 0.4})).count("0.400 (2.50 times faster)") == 1


@pytest.mark.parametrize("by_onednn", [True, False])
def test_selftest_says_where_the_libraries_differ(by_onednn, monkeypatch):
    """Where F.linear and the layer take different matmuls, and a time was taken."""
    monkeypatch.setattr("clora_kernels.selftest._check", lambda dtype, device: [Case(str(dtype), True, "")])
    monkeypatch.setattr("clora_kernels.selftest._seconds", lambda fn, backward, device: 1.0)
    monkeypatch.setattr(cpu_matmul, "_onednn_linear", lambda: by_onednn or None)
    report = selftest(torch.device("cpu"))
    assert ("takes oneDNN's matmuls here" in str(report)) == by_onednn
    monkeypatch.setattr("clora_kernels.selftest._check", lambda dtype, device: [Case(str(dtype), False, "")])
    assert "oneDNN" not in str(selftest(torch.device("cpu")))


def test_why_triton_is_not_there(monkeypatch):
    """Each reason, and that the call gives it."""
    why = routed_lora_dispatch._why_not_triton.__wrapped__
    assert "fp64" in why(torch.float64, "cuda", 0) and "meta" in why(torch.float32, "meta", None)
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert "TRITON_INTERPRET=1" in why(torch.float32, "cpu", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "7.5" in why(torch.float32, "cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert why(torch.bfloat16, "cuda", 0) == ""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(routed_lora_dispatch, "_why_not_triton", why)
    assert "cannot be imported" in why(torch.float32, "cpu", None)
    assert not {b.name: b for b in ck.info().backends["routed_lora"]}["triton"].available
    with pytest.raises(ValueError, match="backend='triton' cannot run routed_lora: triton cannot be imported: "):
        ck.routed_lora_linear(X, W, A, B, backend="triton")


@pytest.mark.parametrize(
    ("version", "told"),
    [("3.6.0", ""), ("3.7.1+git", ""), ("3.60.0", "not tested"), ("3.9.0", "not tested"), ("4.7", "not tested")],
)
def test_a_triton_that_is_not_tested_is_told(version, told, monkeypatch, capsys):
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "triton" else installed(name))
    monkeypatch.setattr("clora_kernels.kernels.aot.judge_all", lambda package: [])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    line = next(line for line in str(ck.info()).splitlines() if line.startswith("triton "))
    assert version in line and (told in line) and ("tested" in line) == bool(told)
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    assert main(["kernels", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "[]\n" and captured.err == (line.replace(" " * 19, " ") + "\n" if told else "")


def test_command_line(capsys, monkeypatch):
    assert main(["info"]) == 0 and capsys.readouterr().out.strip() == str(ck.info())
    failing = type("Report", (), {"ok": False, "__str__": lambda self: "1 failed"})()
    asked = []
    monkeypatch.setattr(
        "clora_kernels.__main__.selftest", lambda device, seconds: asked.append((device.type, seconds)) or failing
    )
    assert main(["selftest", "--device", "cpu"]) == 1 and "1 failed" in capsys.readouterr().out
    assert main(["selftest", "--device", "cpu", "--seconds", "3.5"]) == 1 and asked == [("cpu", 20.0), ("cpu", 3.5)]
    with pytest.raises(SystemExit) as stop:
        main(["selftest", "--device", "nonsense"])
    assert stop.value.code == 2 and "--device nonsense" in capsys.readouterr().err


def test_what_cannot_be_compiled_is_told_without_a_traceback(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["kernels", "--package", "nonexistent"]) == 1
    assert capsys.readouterr().err == "nonexistent: No module named 'nonexistent'\n"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels", "--package", "clora_kernels"]) == 1
    assert "TRITON_INTERPRET: got 1, expected it unset" in capsys.readouterr().err


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "clora_kernels", "info"], capture_output=True, text=True, check=True)
    assert "routed_lora" in done.stdout
