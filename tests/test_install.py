"""Every way to install the package: what is built, what is not, and that the package says why."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "constraints.txt", "Makefile", "csrc"]
BUILD_VARIABLES = {"CC", "CXX", "CFLAGS", "CXXFLAGS", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH"}
# For one kind of processor instead of each: where nothing but the way of the build counts, a third of the time.
ONE_CLONE = dict.fromkeys(("CFLAGS", "CXXFLAGS"), "-DCLORA_ONE_CLONE")
LOOK = """
import json, warnings
import torch
import clora_kernels
from clora_kernels import extension
from clora_kernels.kernels.dropout_mask import dropout_mask
from clora_kernels.reference import dropout_mask as reference
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    arguments = torch.tensor(7), torch.tensor(20000), 3, 5, 21
    same = torch.equal(dropout_mask(*arguments), reference.dropout_mask(*arguments))
parts = {part.name: [part.state, part.detail] for part in extension.status()}
print(json.dumps({"file": clora_kernels.__file__, "version": clora_kernels.__version__, "parts": parts, "same": same,
                  "warned": len(caught), "build": extension.build_info()}))
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources without anything built."""
    target = tmp_path / "tree"
    target.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, target / name)
    built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "clora_kernels", target / "clora_kernels", ignore=built)
    return target


def run(code_or_arguments, cwd, **variables):
    """Runs Python away from the source tree under test, with nothing of the caller's build settings."""
    kept = {k: v for k, v in os.environ.items() if k not in BUILD_VARIABLES and not k.startswith("CLORA_")}
    arguments = ["-c", code_or_arguments] if isinstance(code_or_arguments, str) else code_or_arguments
    environment = kept | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | variables
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def build_wheel(tree, **variables):
    """The wheel as pip asks setuptools for it; returns the finished process and the wheel, if there is one."""
    out = tree.parent / "wheels"
    out.mkdir()
    done = run(f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})", tree, **variables)
    return done, next(out.glob("*.whl"), None)


def unpack(wheel):
    clean = wheel.parent.parent / "clean"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(clean)
    return clean


def look(folder):
    """Imports the package that lies in `folder`, from another directory, and draws a mask with it."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    done = run(LOOK, elsewhere, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert Path(seen["file"]).is_relative_to(folder)
    assert seen["same"]
    return seen


@pytest.fixture
def no_torch(tmp_path):
    """A folder for PYTHONPATH in which torch is as good as absent."""
    folder = tmp_path / "no_torch"
    folder.mkdir()
    (folder / "torch.py").write_text("raise ImportError('no torch in this environment')\n")
    return str(folder)


def test_without_torch_a_pure_python_wheel(tree, no_torch):
    done, wheel = build_wheel(tree, PYTHONPATH=no_torch)
    assert done.returncode == 0, done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "no torch in this environment" in done.stdout
    seen = look(unpack(wheel))
    for part in ("cpu", "cuda"):
        state, detail = seen["parts"][part]
        assert state == "not built" and "no torch in this environment" in detail
        assert "pip install --no-build-isolation ." in detail
    assert seen["warned"] == 1 and seen["build"] == {}


@pytest.mark.parametrize(
    "part, variables, reason",
    [
        ("cpu", {}, "no torch in this environment"),
        ("cuda", {}, "no torch in this environment"),
        ("cuda", {"CLORA_BUILD_CPU": "0"}, "needs the schemas of the CPU part"),
    ],
)
def test_a_demanded_part_that_cannot_be_built_fails(tree, no_torch, part, variables, reason):
    done, wheel = build_wheel(tree, PYTHONPATH=no_torch, **{f"CLORA_BUILD_{part.upper()}": "1"}, **variables)
    assert done.returncode != 0 and wheel is None
    assert f"CLORA_BUILD_{part.upper()}=1" in done.stderr and reason in done.stderr


def test_demanded_cuda_part_without_nvcc_fails(tree):
    done, wheel = build_wheel(tree, CLORA_BUILD_CUDA="1", CUDA_HOME=str(tree / "no_cuda"))
    assert done.returncode != 0 and wheel is None
    assert "CLORA_BUILD_CUDA=1" in done.stderr and "nvcc is not found" in done.stderr


def test_an_unknown_mode_is_refused(tree, no_torch):
    done, wheel = build_wheel(tree, PYTHONPATH=no_torch, CLORA_BUILD_CPU="yes")
    assert done.returncode != 0 and wheel is None
    assert "CLORA_BUILD_CPU must be auto, 0 or 1, got 'yes'" in done.stderr


def test_sdist_installs_with_pip_into_a_clean_directory(tree):
    done = run("from setuptools import build_meta; build_meta.build_sdist('..')", tree)
    assert done.returncode == 0, done.stderr
    [sdist] = tree.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert not any(name.endswith((".so", "_build.json")) for name in names)
    shutil.rmtree(tree)

    clean = sdist.parent / "clean"
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", str(clean), str(sdist)]
    done = run(install, sdist.parent, CLORA_BUILD_CPU="1", CLORA_BUILD_CUDA="0", **ONE_CLONE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (clean / "clora_kernels" / "py.typed").exists() and not (clean / "csrc").exists()
    seen = look(clean)
    assert seen["parts"]["cpu"][0] == "loaded" and seen["warned"] == 0
    assert seen["parts"]["cuda"] == ["not built", "switched off by CLORA_BUILD_CUDA=0"]
    build = seen["build"]
    assert build["version"] == seen["version"] and build["torch_target"] == "2.10"
    assert build["compiler"] and "-O3" in build["flags"] and build["cuda"] is False


def test_a_failing_compiler_leaves_a_working_package_that_says_why(tree):
    done, wheel = build_wheel(tree, CXX="/bin/false", CLORA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    seen = look(unpack(wheel))
    state, detail = seen["parts"]["cpu"]
    assert state == "not built" and "/bin/false returned non-zero exit status 1" in detail
    assert seen["warned"] == 1


def test_a_failing_compiler_fails_the_build_where_the_part_is_demanded(tree):
    done, wheel = build_wheel(tree, CXX="/bin/false", CLORA_BUILD_CPU="1", CLORA_BUILD_CUDA="0")
    assert done.returncode != 0 and wheel is None
    assert "/bin/false" in done.stderr


def test_a_failed_build_in_place_removes_the_library_of_an_earlier_one(tree):
    library = tree / "clora_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.write_bytes(b"of an earlier build")
    done = run(["setup.py", "build_ext", "--inplace"], tree, CXX="/bin/false", CLORA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert not library.exists()
    assert "/bin/false" in json.loads((tree / "clora_kernels" / "_build.json").read_text())["cpu"]


def test_libraries_that_cannot_be_loaded_never_break_the_import(tree):
    library = tree / "clora_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.write_bytes(b"not a library")
    (tree / "clora_kernels" / "_cuda.so").write_bytes(b"not one either")
    seen = look(tree)
    assert seen["parts"]["cpu"][0] == "failed" and library.name in seen["parts"]["cpu"][1]
    assert seen["parts"]["cuda"] == ["failed", "its operators need the schemas of the cpu part, which is failed"]
    assert seen["warned"] == 1


def test_a_library_of_another_interpreter_is_named(tree):
    (tree / "clora_kernels" / "_C.cpython-32-other.so").write_bytes(b"")
    state, detail = look(tree)["parts"]["cpu"]
    assert state == "not built" and "_C.cpython-32-other.so is for another interpreter" in detail
