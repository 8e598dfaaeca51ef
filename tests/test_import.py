"""``import clora_kernels`` works on bare machines, and brings nothing heavy along."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "clora_kernels"

USE = """
    import torch
    import clora_kernels

    x = torch.randn(3, 16, requires_grad=True)
    layer = clora_kernels.RoutedLoRALinear(16, 24, 4, dropout_p=0.5)
    torch.nn.init.normal_(layer.lora_B)
    for backend in ("auto", "aten", "reference"):
        layer.backend = backend
        layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.adapter_parameters())
    assert str(clora_kernels.info())
    import clora_kernels.kernels.declared, clora_kernels.testing, clora_kernels.continual
    import clora_kernels.integrations.peft
"""


def run(*code: str, path: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess:
    source = "\n".join(textwrap.dedent(part) for part in code)
    variables = {**os.environ, "PYTHONPATH": str(path), **environment}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=variables, cwd=path)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "names", [("triton",), ("numpy",), ("transformers", "sklearn", "matplotlib", "tqdm", "peft", "safetensors")]
)
def test_optional_packages_are_optional(names):
    run(f"import sys\nsys.modules.update(dict.fromkeys({names!r}))", USE)  # None in sys.modules: cannot be imported


def test_no_device_is_needed():
    run(USE, "assert not torch.cuda.is_available()", CUDA_VISIBLE_DEVICES="")


def copy_without_binaries(folder: Path) -> Path:
    shutil.copytree(PACKAGE, folder / "clora_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


WITHOUT = """
    import warnings
    warnings.filterwarnings("ignore", "clora_kernels has no compiled", RuntimeWarning)
"""


def test_the_compiled_parts_are_optional(tmp_path):
    path = copy_without_binaries(tmp_path)
    check = f"""
        from clora_kernels import extension
        assert clora_kernels.__file__.startswith({str(path)!r})
        assert [part.state for part in extension.status()] == ["not built", "not built"]
        assert extension.build_info() == {{}} and not extension.has_op("dropout_mask", "cpu")
    """
    run(WITHOUT, USE, check, path=path)


def test_compiled_parts_that_do_not_load_are_survived(tmp_path):
    path = copy_without_binaries(tmp_path)
    binaries = sorted(PACKAGE.glob("_C.*.so"))
    for name in [*(binary.name for binary in binaries), "_cuda.so"]:
        (path / "clora_kernels" / name).write_bytes(b"\x7fELF and nothing more")
    states = ["failed" if binaries else "not built", "failed"]
    check = f"""
        from clora_kernels import extension
        assert [part.state for part in extension.status()] == {states}, extension.status()
        assert all(part.detail for part in extension.status())
    """
    run(WITHOUT, USE, check, path=path)


def test_the_import_brings_nothing_heavy():
    """What the import adds to torch's own: this package and the standard library."""
    code = """
        import sys
        import torch
        before = set(sys.modules)
        import clora_kernels
        added = {name for name in sys.modules if name not in before}
        packages = {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names)
        assert packages <= {"clora_kernels", "torch"}, packages
        heavy = {"torch._dynamo", "torch._inductor", "torch.distributed", "torch.utils.cpp_extension", "torch.testing"}
        assert not heavy & added, heavy & added
        assert len(added) < 120, sorted(added)
        lazy = {"clora_kernels.testing", "clora_kernels.continual", "clora_kernels.selftest"}
        assert not lazy & added, lazy & added
    """
    run(code)
