"""Every CUDA source compiles for every target without a warning and without a register spilled; no GPU needed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
TARGETS = ["sm_80", "sm_90", "sm_100"]


@pytest.fixture(scope="session")
def nvcc():
    at_home = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    found = shutil.which("nvcc") or shutil.which(at_home)
    if found is None:
        reason = "nvcc is neither on PATH nor in CUDA_HOME: the CUDA sources are not compiled"
        if os.environ.get("CLORA_REQUIRE_NVCC") == "1":
            pytest.fail(f"{reason}, and CLORA_REQUIRE_NVCC=1 demands it")
        pytest.skip(reason)
    return found


def compile_verbosely(nvcc, source, target, folder):
    """Returns the compiler's process; its stderr holds what ptxas has to say about each kernel."""
    arch = target.removeprefix("sm_")
    command = [nvcc, "-std=c++17", "-O3", "-c", str(source), "-o", str(folder / "object.o")]
    command += [f"-gencode=arch=compute_{arch},code={target}", "-Xptxas=-v", "-Werror=all-warnings"]
    command += ["-Xcompiler=-fPIC,-Wall", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-isystem={path}" for path in include_paths()]
    return subprocess.run(command, capture_output=True, text=True)


def spills_of(report):
    """Kernel name -> bytes spilled (stores and loads), from the report of ``-Xptxas -v``."""
    kernels = re.findall(r"Function properties for (\S+)\s.*?(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return {name: int(stores) + int(loads) for name, stores, loads in kernels}


def test_there_are_sources_to_compile():
    assert {"dropout_mask.cu", "rank1_experts.cu"} <= {source.name for source in SOURCES}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_source_compiles_without_warnings_or_spills(nvcc, source, target, tmp_path):
    done = compile_verbosely(nvcc, source, target, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    spills = spills_of(done.stderr + done.stdout)
    kernels = len(re.findall(r"Compiling entry function \S+ for", done.stderr + done.stdout))
    assert len(spills) >= kernels > 0, done.stderr
    assert not any(spills.values()), spills


def test_the_checks_see_a_spill_and_a_warning(nvcc, tmp_path):
    """The same command on a kernel that must spill, and on one with an unused variable."""
    spilling = tmp_path / "spilling.cu"
    spilling.write_text("""
        __global__ void __launch_bounds__(1024, 2) spilling(float* at) {
          float kept[96];
        #pragma unroll
          for (int i = 0; i < 96; ++i) kept[i] = at[i * 1024 + threadIdx.x];
          __syncthreads();
        #pragma unroll
          for (int i = 0; i < 96; ++i) at[(95 - i) * 1024 + threadIdx.x] = kept[i] * kept[95 - i];
        }
    """)
    done = compile_verbosely(nvcc, spilling, "sm_90", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sum(spills_of(done.stderr + done.stdout).values()) > 0
    warned = tmp_path / "warned.cu"
    warned.write_text("__global__ void warned(float* at) { int unused; at[0] = 1.f; }")
    assert compile_verbosely(nvcc, warned, "sm_90", tmp_path).returncode != 0


def test_demanded_cuda_library_is_built_even_against_a_cpu_only_torch(nvcc, tmp_path):
    """The library links, asks for the real libtorch_cuda, and where that is missing the package says so."""
    for name in ("csrc", "clora_kernels"):
        built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    environment = dict(os.environ, CLORA_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0+PTX", PYTHONPATH=str(tmp_path))
    environment |= dict.fromkeys(("CFLAGS", "CXXFLAGS"), "-DCLORA_ONE_CLONE")  # the CPU part is soon done
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "code=[sm_90,compute_90]" in done.stdout
    code = (
        "from clora_kernels import extension as e; build = e.build_info(); "
        "print(build['cuda'], build['cuda_archs'], *(f'{part.state}: {part.detail}' for part in e.status()), sep='\\n')"
    )
    seen = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert seen.returncode == 0, seen.stderr
    cuda, archs, cpu_part, cuda_part = seen.stdout.splitlines()
    assert (cuda, archs) == ("True", "9.0+PTX") and cpu_part.startswith(f"loaded: {tmp_path}")
    if torch.version.cuda is None:
        assert cuda_part.startswith("failed: libtorch_cuda.so")
    else:
        assert cuda_part.startswith(f"loaded: {tmp_path}")
