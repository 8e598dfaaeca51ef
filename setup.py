"""Builds the two compiled parts of clora_kernels; everything else about the package stands in pyproject.toml.

cpu    the Python module ``clora_kernels._C``: schemas and CPU operators. Needs torch and a C++17 compiler.
cuda   the library ``clora_kernels/_cuda.so``: CUDA operators, no Python in it. Needs nvcc, and torch built for CUDA.

``CLORA_BUILD_CPU`` and ``CLORA_BUILD_CUDA`` are ``auto`` (the default: build what can be built, warn about the rest),
``0`` (do not build) or ``1`` (fail if it cannot be built; the CUDA part is then also built against a CPU-only torch).
What was not built, and why, is kept in ``clora_kernels/_build.json`` for ``clora_kernels.info()``.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import ExecError

PACKAGE = "clora_kernels"
MODULES = {"cuda": f"{PACKAGE}._cuda", "cpu": f"{PACKAGE}._C"}
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10: good for every later one
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", TORCH_TARGET]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", TORCH_TARGET]
DEFAULT_ARCHS = ("8.0", "9.0", "10.0")
not_built: dict[str, str] = {}


class CannotBuildError(Exception):
    """Why a part cannot be built here."""


def mode(part: str) -> str:
    variable = f"CLORA_BUILD_{part.upper()}"
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable} must be auto, 0 or 1, got {value!r}")
    return value


def import_torch() -> ModuleType:
    try:
        import torch.utils.cpp_extension
    except Exception as error:
        raise CannotBuildError(
            f"torch cannot be imported at build time ({error}); install it first, then `pip install "
            "--no-build-isolation .`"
        ) from error
    return torch


def cpu_extension() -> Extension:
    from_torch = import_torch().utils.cpp_extension
    return Extension(
        MODULES["cpu"],
        sorted(map(str, Path("csrc").glob("*.cpp"))),
        extra_compile_args=[*CXX_FLAGS, *(f"-isystem{path}" for path in from_torch.include_paths())],
        library_dirs=from_torch.library_paths(),
        libraries=["torch_cpu"],
        language="c++",
    )


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        if nvcc := shutil.which(place):
            return nvcc
    raise CannotBuildError(f"nvcc is not found (looked for {' and '.join(places)}; CUDA_HOME tells another place)")


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures as in TORCH_CUDA_ARCH_LIST; by default those this nvcc knows, with PTX of the last."""
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return re.split(r"[\s;,]+", chosen.strip())
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    archs = [arch for arch in DEFAULT_ARCHS if f"sm_{arch.replace('.', '')}" in known]
    if not archs:
        raise CannotBuildError(f"{nvcc} knows none of the architectures {', '.join(DEFAULT_ARCHS)}")
    return [*archs[:-1], archs[-1] + "+PTX"]


def gencode(arch: str) -> str:
    match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
    if match is None:
        raise CannotBuildError(f"TORCH_CUDA_ARCH_LIST holds {arch!r}; expected entries like 9.0 or 9.0+PTX")
    number = match[1] + match[2]
    code = f"[sm_{number},compute_{number}]" if match[3] else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def cuda_extension() -> Extension:
    if mode("cpu") == "0":
        raise CannotBuildError("the CUDA part needs the schemas of the CPU part, which CLORA_BUILD_CPU=0 switches off")
    torch = import_torch()
    if torch.version.cuda is None and mode("cuda") == "auto":
        raise CannotBuildError(f"torch {torch.__version__} is not a CUDA build")
    nvcc = find_nvcc()
    archs = cuda_archs(nvcc)
    from_torch = torch.utils.cpp_extension
    extension = Extension(
        MODULES["cuda"],
        sorted(map(str, Path("csrc").glob("*.cu"))),
        extra_compile_args=[
            *NVCC_FLAGS,
            *map(gencode, archs),
            *(f"-isystem={path}" for path in from_torch.include_paths()),
        ],
        library_dirs=from_torch.library_paths(),
        libraries=["torch_cpu", "torch_cuda"],
    )
    extension.nvcc, extension.archs, extension.torch_has_cuda = nvcc, archs, torch.version.cuda is not None
    return extension


def planned_extensions() -> list[Extension]:
    extensions = []
    for part, plan in (("cuda", cuda_extension), ("cpu", cpu_extension)):  # `_C` tells whether CUDA was built: last
        if mode(part) == "0":
            not_built[part] = f"switched off by CLORA_BUILD_{part.upper()}=0"
            continue
        try:
            extension = plan()
        except CannotBuildError as why:
            if mode(part) == "1":
                raise SystemExit(f"CLORA_BUILD_{part.upper()}=1, but the {part} part cannot be built: {why}") from why
            not_built[part] = str(why)
            print(f"warning: {PACKAGE} is built without its {part} part: {why}")
            continue
        extension.part, extension.optional = part, mode(part) == "auto"
        extensions.append(extension)
    return extensions


def keep_reasons(directory: str) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    Path(directory, "_build.json").write_text(json.dumps(not_built, indent=2) + "\n")


def side_by_side(compile_sources: Callable[..., list[str]], sources: list[str], **options: object) -> list[str]:
    """Compile each source by itself, as many at a time as there are processors: the objects in their order."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) as pool:
        objects = pool.map(lambda source: compile_sources([source], **options), sources)
        return [name for of_source in objects for name in of_source]


class BuildPython(build_py):
    """A pure-Python install has no extension to build, so the reasons are written here too."""

    def run(self) -> None:
        super().run()
        keep_reasons(PACKAGE if self.editable_mode else os.path.join(self.build_lib, PACKAGE))


class BuildParts(build_ext):
    def run(self) -> None:
        self.force = True  # versions, flags and architectures are compiled in: no date tells that a file is up to date
        super().run()
        for part in not_built:  # an earlier build's library must not pass for this one's
            Path(self.get_ext_fullpath(MODULES[part])).unlink(missing_ok=True)
        keep_reasons(PACKAGE if self.inplace else os.path.join(self.build_lib, PACKAGE))

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_cuda"):
            return os.path.join(*fullname.split(".")) + ".so"  # no Python in it: one file for every Python
        return super().get_ext_filename(fullname)

    def build_extension(self, extension: Extension) -> None:
        try:
            (self.build_cuda if extension.part == "cuda" else self.build_cpu)(extension)
        except Exception as error:
            reason = re.sub(r"Command '\['([^']*)'.*\]' returned", r"\1 returned", str(error))
            not_built[extension.part] = f"the build failed: {reason}"
            raise

    def build_cpu(self, extension: Extension) -> None:
        import torch

        archs = next((e.archs for e in self.extensions if e.part == "cuda" and "cuda" not in not_built), [])
        strings = {
            "CLORA_VERSION": self.distribution.get_version(),
            "CLORA_TORCH_VERSION": torch.__version__,
            "CLORA_FLAGS": " ".join(CXX_FLAGS),
            "CLORA_CUDA_ARCHS": " ".join(archs),
        }
        extension.define_macros = [(name, f'"{value}"') for name, value in strings.items()]
        self.compiler.compile = partial(side_by_side, self.compiler.compile)
        super().build_extension(extension)

    def build_cuda(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        folders = list(extension.library_dirs)
        if not extension.torch_has_cuda:
            folders.append(self.stand_in_for_torch_cuda(extension.nvcc))
        self.call([
            extension.nvcc, "-shared", "-o", str(target), *extension.sources, *extension.extra_compile_args,
            "-Xlinker=--no-as-needed", *(f"-L{folder}" for folder in folders),
            *(f"-l{library}" for library in extension.libraries),
        ])  # fmt: skip

    def stand_in_for_torch_cuda(self, nvcc: str) -> str:
        """An empty library of libtorch_cuda's name, so that a build against a CPU-only torch asks for the real one."""
        folder = Path(self.build_temp, "stand_in")
        folder.mkdir(parents=True, exist_ok=True)
        library = str(folder / "libtorch_cuda.so")
        self.call([nvcc, "-shared", "-cudart=none", "-x=cu", os.devnull, "-o", library,
                   "-Xlinker=-soname=libtorch_cuda.so"])  # fmt: skip
        return str(folder)

    def call(self, command: list[str]) -> None:
        print(" ".join(command), flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout + done.stderr, end="", flush=True)
        if done.returncode:
            raise ExecError(f"{command[0]} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")


if __name__ == "__main__":
    setup(ext_modules=planned_extensions(), cmdclass={"build_py": BuildPython, "build_ext": BuildParts})
