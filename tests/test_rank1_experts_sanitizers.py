"""The compiled CPU operators of rank-1 experts under AddressSanitizer and UndefinedBehaviorSanitizer: random calls on
memory that ends with its last element, each against fp64, and choices that lead outside, which are refused."""

from __future__ import annotations

import shutil
import sysconfig
from ast import literal_eval
from pathlib import Path

import pytest
import sanitizers
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parent.parent
STRINGS = ("CLORA_VERSION", "CLORA_TORCH_VERSION", "CLORA_FLAGS", "CLORA_CUDA_ARCHS")
OPTIONS = ["-O0", "-g1", "-fopenmp-simd", "-DCLORA_ONE_CLONE", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
OPTIONS += [f'-D{name}=""' for name in STRINGS]
OPTIONS += [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
CALLS, SEED = 90, "20250217"

pytestmark = pytest.mark.skipif(bool(why := sanitizers.why_not()), reason=why or "runs")


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    """What the operators enter Python by."""
    folder = tmp_path_factory.mktemp("frame")
    for name in ("ops", "module"):
        sanitizers.build(ROOT / "csrc" / f"{name}.cpp", folder / f"{name}.o", *OPTIONS, "-c")
    return [str(folder / f"{name}.o") for name in ("ops", "module")]


def run(frame, folder, csrc=ROOT / "csrc"):
    """The calls on a copy of the package that holds these operators alone."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    package = shutil.copytree(ROOT / "clora_kernels", folder / "clora_kernels", ignore=ignored)
    target = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu"]
    rest = str(csrc / "rank1_experts_bf16.cpp")
    sanitizers.build(csrc / "rank1_experts.cpp", target, rest, *OPTIONS, *frame, "-shared", *libraries)
    return sanitizers.run([str(ROOT / "tests" / "rank1_experts_calls.py"), "compiled", str(CALLS), SEED], folder)


def test_random_calls(frame, tmp_path):
    done = run(frame, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert literal_eval(done.stdout) == dict.fromkeys(("shrink", "expand", "reduce"), CALLS // 3)


def test_a_column_too_many_is_seen(frame, tmp_path):
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    loads, right = csrc / "rank1_experts_rows.h", "std::memcpy(values, from, static_cast<size_t>(count)"
    assert loads.read_text().count(right) == 1
    loads.write_text(loads.read_text().replace(right, right.replace("(count)", "(count + 1)")))
    done = run(frame, tmp_path, csrc)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stdout + done.stderr
    assert "load_step" in done.stderr
