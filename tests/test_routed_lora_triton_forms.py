"""How the kernels of routed LoRA are declared, and what some of them show compiled; test_aot compiles them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are Triton's")

from clora_kernels.kernels.declared import Expects
from clora_kernels.kernels.routed_lora.tiles import LinearTile, ReduceTile, ShrinkTile
from clora_kernels.kernels.routed_lora.triton import forms, linear_kernels

ROOT = Path(__file__).resolve().parent.parent
COMPILED = """
import importlib, json, re
from clora_kernels.kernels.aot import compile_for, judge
found = {"failures": [], "specialized": [], "unproved": []}
for module in ("pack", "unpack", "shrink", "reduce", "linear_kernels"):
    forms = importlib.import_module("clora_kernels.kernels.routed_lora.triton." + module).COMPILATIONS
    for form in {form.kernel: form for form in forms}.values():
        found["specialized"] += [form.name for p in form.kernel.params if p.name == "M" and not p.do_not_specialize]
    exact = [form for form in forms if not form.expects.tf32 and not re.search("bf16|fp16", str(form.signature))]
    found["unproved"] += {form.name for form in forms} - {form.name for form in exact}
    for form in {form.kernel: form for form in reversed(exact)}.values():
        report = judge(form, form.architectures[-1])
        found["failures"] += [(form.name, *failure) for failure in report.failures.items()]
print(json.dumps(found))
"""


def test_fp32_stays_fp32_and_M_is_never_compiled_in():
    """The first form in fp32 of each kernel; in a process of its own, for under the interpreter nothing is compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"failures": [], "specialized": [], "unproved": []}


def test_a_form_is_what_a_launch_is():
    arguments = dict.fromkeys(linear_kernels.linear_kernel.arg_names, 1)
    arguments |= {"M": "i32", "N": "i32", "a_ptrs": ("*bf16", None), "y_ptr": "*bf16"}
    found = forms.form(linear_kernels.linear_kernel, arguments, num_warps=8, num_stages=5, architectures=(90,))
    assert {*found.signature} == {"M", "N", "a_ptrs", "y_ptr"}
    assert {*found.constants} == {*arguments} - {*found.signature}
    assert (found.num_warps, found.num_stages, found.unaligned, found.architectures) == (8, 5, ("M",), (90,))
    assert found.expects == Expects() and forms.form(linear_kernels.linear_kernel, arguments).architectures == (80, 90)
    assert not any(map(forms._is_type, (1, None, "ieee"))) and all(map(forms._is_type, ("*fp32", "i32", "tensordesc<")))


def test_forms_have_the_tiles_of_large_calls():
    found = forms.tiled(ShrinkTile(16, 16, num_warps=2, num_stages=7), 80, Expects(wgmma=False))
    expected = {"num_warps": 2, "num_stages": 7, "architectures": (80,), "expects": Expects(wgmma=False)}
    assert found == expected
    assert forms.tile_for("linear", 90, "bf16", 16, tma=True) == LinearTile(128, 256, 64, num_warps=8)
    assert forms.tile_for("linear", 90, "bf16", 16, K=0) == LinearTile(64, 128, 32, 8, 2, per_sm=2)
    assert forms.tile_for("linear", 80, "bf16", 16, bucket=0) == LinearTile(64, 128, 64, 4, 3, per_sm=2)
    assert forms.tile_for("reduce", 80, "fp32", 256) == ReduceTile(32, 32, num_warps=8)
