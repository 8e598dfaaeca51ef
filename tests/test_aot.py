"""The declared Triton kernels compile for GPUs that need not be here; and the harness that says so is itself proved."""

import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from clora_kernels.kernels import declared as registry
from clora_kernels.kernels import ttgir
from clora_kernels.kernels.aot import _argument
from clora_kernels.kernels.declared import Compilation, Expects, declared

TESTS = Path(__file__).parent


def run_aot(*arguments: str, path: Path = TESTS) -> subprocess.CompletedProcess:
    """In a process of its own: under TRITON_INTERPRET, which the tests may have set, nothing is compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(path), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "clora_kernels", "kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_declared_kernels_compile_and_show_what_they_must():
    done = run_aot()
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows, last = done.stdout.splitlines()
    assert last.endswith(" compilations of clora_kernels.kernels, 0 failed")
    assert header.split() == [
        "kernel",
        "GPU",
        "dtypes",
        "registers",
        "spilled",
        "shared",
        *"instructions, buffers, tile".split(),
    ]
    of_dtypes = slice(header.index("dtypes"), header.index("registers"))
    for row in rows:
        assert re.fullmatch(r"(?:(?:bf|fp|i)\d+ ?)+ *", row[of_dtypes]) and row[of_dtypes.stop :].split()[0].isdigit()


@pytest.fixture(scope="module")
def fragments() -> dict[str, list[dict]]:
    """The reports of the test kernels, by their names in ``aot_fragments``."""
    pytest.importorskip("triton", reason="kernels are compiled by Triton")
    from aot_fragments import FRAGMENTS

    done = run_aot("--package", "aot_fragments", "--json")
    assert done.returncode == 1, done.stderr
    reports = iter(json.loads(done.stdout))
    found = {name: [next(reports) for _ in compilation.architectures] for name, compilation in FRAGMENTS.items()}
    assert next(reports, None) is None
    return found


def test_each_check_fails_the_kernel_written_for_it_and_no_other(fragments):
    from aot_fragments import FAILS

    failed = {}
    for name, reports in fragments.items():
        if checks := {(report["architecture"], check) for report in reports for check in report["failures"]}:
            failed[name] = checks
    assert failed == FAILS
    assert {check for checks in FAILS.values() for _, check in checks} == {
        "compile", "shared", "spill", "wgmma", "buffers", "tf32",
    }  # fmt: skip


def test_reports_show_registers_instructions_and_buffers(fragments):
    on_80, on_90 = fragments["good"]
    assert 32 <= on_80["registers"] <= 255 and 32 <= on_90["registers"] <= 255
    assert on_80["instructions"] == ["mma.sync", "cp.async.cg"]
    assert on_90["instructions"] == ["wgmma.mma_async", "cp.async.cg"]
    assert on_80["dtypes"] == fragments["good by TMA"][0]["dtypes"] == "bf16"
    assert fragments["good in fp32"][0]["dtypes"] == "fp32"
    assert on_80["buffers"] == {"x_ptr": 2, "w_ptr": 2}  # one of three stages waits in registers
    assert on_90["buffers"] == {"x_ptr": 3, "w_ptr": 3}
    assert on_80["shared"] == 2 * 2 * 128 * 64 * 2 and on_90["shared"] == 3 * 2 * 128 * 64 * 2
    (by_tma,) = fragments["good by TMA"]
    assert by_tma["instructions"] == ["wgmma.mma_async", "cp.async.bulk.tensor"]
    assert by_tma["buffers"] == {"x_desc": 3, "w_desc": 3, "q_desc": 1, "c_desc": 1}
    assert not {".tf32", *fragments["good"][1]["instructions"][:1]} & {*fragments["good in fp32"][1]["instructions"]}
    assert ".tf32" in fragments["tf32 wanted"][1]["instructions"]
    assert fragments["spilled"][0]["spilled"] > 100


def test_a_kernel_that_is_not_declared_fails(tmp_path):
    pytest.importorskip("triton", reason="kernels are compiled by Triton")
    source = """
        import triton
        import triton.language as tl

        @triton.jit
        def forgotten(x_ptr):
            tl.store(x_ptr, 1.0)
        """
    (tmp_path / "some_kernels.py").write_text(textwrap.dedent(source))
    done = run_aot("--package", "some_kernels", path=tmp_path)
    assert done.returncode == 1 and "got none for forgotten" in done.stderr


def kernel(*names: str) -> SimpleNamespace:
    return SimpleNamespace(__name__="some", arg_names=list(names))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signature": {"x_ptr": "*bf16"}}, "signature, constants: got"),
        ({"constants": {"M": 1, "BLOCK": 16}}, "signature, constants: got"),
        ({"unaligned": ("BLOCK",)}, "unaligned: got"),
        ({"expects": Expects(single_buffered=("y_ptr",))}, "expects.single_buffered: got"),
        ({"architectures": ()}, "architectures: got"),
        ({"architectures": (80, 75)}, "architectures: got"),
    ],
)
def test_a_wrong_declaration_raises(options, message):
    right = {"signature": {"x_ptr": "*bf16", "M": "i32"}, "constants": {"BLOCK": 16}}
    assert Compilation(kernel("x_ptr", "M", "BLOCK"), **right).tile == "BLOCK=16 warps=4 stages=3"
    with pytest.raises(ValueError, match=message):
        Compilation(kernel("x_ptr", "M", "BLOCK"), **right | options)


def test_declarations_are_gathered_and_limited(monkeypatch):
    one = Compilation(kernel("x_ptr"), {"x_ptr": "*bf16"}, {})
    with pytest.raises(FrozenInstanceError):
        one.num_warps = 8
    module = ModuleType("some_declarations")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert declared(module.__name__) == []
    module.COMPILATIONS = [one] * registry.LIMIT
    assert declared(module.__name__) == module.COMPILATIONS
    module.COMPILATIONS = [one] * (registry.LIMIT + 1)
    with pytest.raises(ValueError, match="got 301 in some_declarations, expected 300 at most"):
        declared(module.__name__)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        declared(module.__name__)


LOOP = """
module attributes {"ttg.num-warps" = 8 : i32} {
  tt.func public @some(%x_ptr: !tt.ptr<bf16> loc("x_ptr"(#loc)), %w_ptr: !tt.ptr<bf16>, %a_ptr: !tt.ptr<bf16>) {
    %x = ttg.local_alloc : () -> !ttg.memdesc<BUFFERSx128x64xbf16, #shared, #smem, mutable>
    %a = tt.load %a_ptr : tensor<64x128x!tt.ptr<bf16>, #blocked>
    %first = TAKE %x[%c0] : !ttg.memdesc<BUFFERSx128x64xbf16> -> !ttg.memdesc<128x64xbf16>
    %t = ttg.async_copy_global_to_local %x_ptr, %first : tensor<128x64x!tt.ptr<bf16>> -> <128x64xbf16>
    %acc:4 = scf.for %k = %c0 to %K step %c1 iter_args(%sum = %cst, %xs = %x_ptr, %ws = %w_ptr, %token = %t) -> (i32) {
      %0 = ttg.async_wait %token {num = 0 : i32}
      %tile = TAKE %x[%k] : !ttg.memdesc<BUFFERSx128x64xbf16> -> !ttg.memdesc<128x64xbf16>
      %left = ttg.local_load %tile token %0 : !ttg.memdesc<128x64xbf16> -> tensor<128x64xbf16>
      %right = scf.if %even -> (tensor<64x128xbf16>) {
        %v = tt.load %ws, %mask : tensor<64x128x!tt.ptr<bf16>, #blocked>
        scf.yield %v : tensor<64x128xbf16>
      } else {
        %v = arith.addf %a, %a : tensor<64x128xbf16>
        scf.yield %v : tensor<64x128xbf16>
      }
      %more = tt.dot %left, %right, %sum, inputPrecision = tf32 : tensor<128x64xbf16> * tensor<64x128xbf16>
      %next = TAKE %x[%k] : !ttg.memdesc<BUFFERSx128x64xbf16> -> !ttg.memdesc<128x64xbf16>
      %xs_2 = tt.addptr %xs, %c64 : !tt.ptr<bf16>, i32
      %t_2 = ttg.async_copy_global_to_local %xs_2, %next mask %mask : tensor<128x64x!tt.ptr<bf16>> -> <128x64xbf16>
      scf.yield %more, %xs_2, %ws, %t_2 : tensor<128x128xf32>, !tt.ptr<bf16>, !tt.ptr<bf16>, !ttg.async.token
    }
    %last = tt.dot %a, %a, %acc#0, inputPrecision = tf32 : tensor<128x64xbf16> * tensor<64x128xbf16>
    tt.return
  }
}
"""


@pytest.mark.parametrize("take", ["ttg.memdesc_index", "ttg.memdesc_subview"])
@pytest.mark.parametrize("buffers", [1, 3])
def test_operands_are_followed_to_the_arguments_they_are_read_from(take, buffers):
    parsed = ttgir.Kernel(LOOP.replace("TAKE", take).replace("BUFFERS", str(buffers)))
    assert len(parsed.dots) == 2 and list(parsed.arguments) == ["x_ptr", "w_ptr", "a_ptr"]
    ((dot, reads),) = parsed.loop_reads()  # the second matmul is in no loop, and %a is read before it
    assert "%left, %right" in dot.text
    assert reads == {ttgir.Read("x_ptr", buffers), ttgir.Read("w_ptr", 1)}


def test_entries_of_a_tuple_bear_its_name():
    """As Triton calls them in the TTGIR, up to 3.8 and from 3.9 on; a name of the signature stands for itself."""
    declaration = Compilation(kernel("x_ptrs", "y_0"), {"x_ptrs": ("*bf16",) * 11, "y_0": "i32"}, {})
    named = {"x_ptrs": "x_ptrs", "x_ptrs_10": "x_ptrs", "x_ptrs.10": "x_ptrs", "y_0": "y_0"}
    assert {name: _argument(name, declaration) for name in named} == named


def test_a_while_loop_is_a_loop():
    text = """
  tt.func public @some(%x_ptr: !tt.ptr<bf16>, %n: i32) {
    %r:2 = scf.while (%p = %x_ptr, %i = %n) : (!tt.ptr<bf16>, i32) -> (!tt.ptr<bf16>, i32) {
      %more = arith.cmpi slt, %i, %n : i32
      scf.condition(%more) %p, %i : !tt.ptr<bf16>, i32
    } do {
    ^bb0(%q: !tt.ptr<bf16> loc("x"), %j: i32):
      %x = tt.load %q : tensor<64x64x!tt.ptr<bf16>>
      %y = tt.dot %x, %x, %cst : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>
      scf.yield %q, %j : !tt.ptr<bf16>, i32
    }
    tt.return
  }
"""
    assert [reads for _, reads in ttgir.Kernel(text).loop_reads()] == [{ttgir.Read("x_ptr", 1)}]
