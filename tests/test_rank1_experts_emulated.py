"""The CUDA kernels of rank-1 experts on an emulated GPU under sanitizers: parity with fp64 on random calls, no access
outside, no barrier that is missing or missed; no GPU needed, and nothing of CUDA."""

from __future__ import annotations

import shutil
from ast import literal_eval
from pathlib import Path

import pytest
import sanitizers

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
OPTIONS = ["-O0", "-g1", "-fno-strict-aliasing", "-fno-extern-tls-init", f"-I{TESTS / 'emulation'}", "-shared"]
SEED = "20250217"

pytestmark = pytest.mark.skipif(bool(why := sanitizers.why_not()), reason=why or "runs")


def run(primitive, calls, folder, csrc=CSRC):
    sanitizers.build(TESTS / "emulation" / f"{primitive}.cpp", folder / f"{primitive}.so", *OPTIONS, f"-I{csrc}")
    program = [str(TESTS / "rank1_experts_calls.py"), str(folder), str(calls), SEED, primitive]
    return sanitizers.run(program, TESTS.parent)


@pytest.mark.parametrize("primitive, calls, ways", [
    ("shrink", 60, {0, 1, 2, 3, 4, 5, 6, 7}), ("expand", 50, {0, 1, 4, 5}), ("reduce", 36, {0, 1, 2, 3, 6, 7}),
])  # fmt: skip
def test_random_calls(tmp_path, primitive, calls, ways):
    """``ways``: by vectors or not, whole or in chunks, by one warp or several, as ``tests/emulation`` numbers them."""
    done = run(primitive, calls, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    seen, counted = map(literal_eval, done.stdout.splitlines())
    assert counted == {primitive: calls} and ways <= set(seen[primitive])


@pytest.mark.parametrize("primitive, file, old, new, said", [
    ("shrink", "shrink", "sums[warp][lane] = sum;\n      __syncthreads();", "sums[warp][lane] = sum;", "element error"),
    ("expand", "expand", "+= own[(p * R * W + i) * kLanes];\n      __syncthreads();",
     "+= own[(p * R * W + i) * kLanes];\n      if (part == 0) __syncthreads();", "deadlock: "),
    ("expand", "pieces", "index < 0 ? 0 : index < experts ? index : experts - 1", "index < 0 ? 0 : index",
     "AddressSanitizer"),
], ids=["no barrier", "a barrier for some", "no upper bound"])  # fmt: skip
def test_what_is_broken_is_seen(tmp_path, primitive, file, old, new, said):
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    broken = csrc / f"rank1_experts_{file}.cuh"
    assert broken.read_text().count(old) == 1
    broken.write_text(broken.read_text().replace(old, new))
    done = run(primitive, 60, tmp_path, csrc)
    assert done.returncode != 0 and said in done.stderr, done.stdout + done.stderr
