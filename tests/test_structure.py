"""The rules of the layout: imports go down, one stem an operation, short files, documented names, nothing foreign."""

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import clora_kernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "clora_kernels"

# From the bottom to the top; a part imports from itself and from the parts below it.
PARTS = [
    "extension",
    "library",
    "reference",
    "kernels",
    "dispatch",
    "autograd",
    "modules",
    "report",
    "clora_kernels",
    "testing",
    "continual",
    "integrations",
]
ENTRIES = ["selftest", "tune", "__main__"]
RANK = {part: rank for rank, part in enumerate([*PARTS, *ENTRIES])}

OPERATIONS = ["gram_schmidt", "rank1_experts", "routed_lora"]
WITHOUT = {"modules": {"gram_schmidt"}}  # it has no parameters
SHARED = {  # files that serve several operations, or tests, beside the ones that bear an operation's name
    "reference": {"dropout_mask"},
    "kernels": {"dropout_mask", "cpu_matmul", "views", "declared", "aot", "ttgir", "launch"},
    "dispatch": {"choice", "indices"},
    "autograd": {"dropout_mask"},
    "modules": {"adapter", "inject", "sharded"},
}
TOP_LEVEL = {
    ".ci", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in",
    "Makefile", "README.md", "benchmarks", "clora_kernels", "constraints.txt", "csrc", "docs", "examples",
    "pyproject.toml", "setup.py", "tests",
}  # fmt: skip

# Each is written so that it does not match itself.
FOREIGN = {
    "a path of one machine": r"(?<![\w.])/(?:[h]ome|[w]ork|[r]oot|[U]sers|[m]nt)/\w",
    "a package registry": r"[i]ndex-url|[p]ythonhosted|[p]ypi\.org|download\.[p]ytorch",
    "a document that is not here": r"\b(?:[D]ESIGN|[M]ETHODS|[A]NCHORS)(?:\.md| ?§)|(?<![\w/])(?:[s]hared|[t]ried)/",
    "the making of it": r"\b(?:[i]ssue #?\d+|[w]orkplace|[C]laude|[A]nthropic|as an [A]I)\b",
    "unfinished work": r"\b(?:[T]ODO|[F]IXME|[X]XX)\b",
}  # fmt: skip


def files(*suffixes: str) -> list[Path]:
    """The files that git tracks with these suffixes (all: none given); of an unpacked archive, what lies there."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\0")[:-1] if (ROOT / ".git").exists() and listed.returncode == 0 else []
    found = [ROOT / name for name in names] or [
        path
        for top in sorted(TOP_LEVEL)
        for path in sorted({ROOT / top, *(ROOT / top).rglob("*")})
        if "__pycache__" not in path.parts and path.suffix != ".so"
    ]
    return [path for path in found if path.is_file() and (not suffixes or path.suffix in suffixes)]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in files(".py") if path.relative_to(ROOT).parts[0] == PACKAGE}


def imports(name: str, path: Path) -> list[tuple[int, str]]:
    """(line, module of this package) of every import in the file, those inside functions too."""
    found = []
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            base = ".".join(filter(None, [start, node.module])) if node.level else node.module
            for alias in node.names:
                if alias.name != "__version__":
                    inside = f"{base}.{alias.name}"
                    found.append((node.lineno, inside if inside in MODULES else base))
    return [(line, target) for line, target in found if target.split(".")[0] == PACKAGE]


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else PACKAGE


def rank_of(module: str) -> int:
    return RANK[part_of(module)]


def test_imports_go_downwards():
    assert len(MODULES) > 20
    upward = []
    for name, path in MODULES.items():
        if name == PACKAGE:
            continue
        for line, target in imports(name, path):
            if part_of(target) != part_of(name) and rank_of(target) >= rank_of(name):
                upward.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not upward, "\n".join(upward)


def test_relative_imports_are_resolved():
    """The test above would pass on anything if it saw no imports."""
    seen = {target for name, path in MODULES.items() for _, target in imports(name, path)}
    assert {"clora_kernels.extension", "clora_kernels.library", "clora_kernels.reference.routed_lora"} <= seen
    algebra = MODULES["clora_kernels.kernels.routed_lora.algebra"]
    assert "clora_kernels.reference.routed_lora" in {t for _, t in imports(module_name(algebra), algebra)}


@pytest.mark.parametrize("folder", SHARED)
def test_one_stem_for_an_operation(folder):
    inside = ROOT / PACKAGE / folder
    stems = {Path(p.relative_to(inside).parts[0]).stem for p in MODULES.values() if p.is_relative_to(inside)}
    own = stems - SHARED[folder] - {"__init__"}
    for operation in {*OPERATIONS} - WITHOUT.get(folder, set()):
        assert operation in own, f"{folder} lacks {operation}.py or {operation}/"
    nameless = {stem for stem in own if not stem.startswith(tuple(OPERATIONS))}
    assert not nameless, f"{folder} holds {nameless}, named after none of {OPERATIONS}"


@pytest.mark.parametrize("operation", [*OPERATIONS, "dropout_mask"])
def test_every_operation_is_proved_and_measured(operation):
    assert list((ROOT / "tests").glob(f"test_{operation}*.py"))
    assert list((ROOT / "benchmarks").glob(f"bench_{operation}.py")) or operation not in OPERATIONS


@pytest.mark.parametrize("limit", [300])
def test_files_are_short(limit):
    long = {str(p.relative_to(ROOT)): n for p in files(".py") if (n := len(p.read_text().splitlines())) > limit}
    assert not long
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def is_kernel(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)


def test_triton_kernels_are_short():
    lengths = {}
    for path in files(".py"):
        for node in filter(is_kernel, ast.walk(ast.parse(path.read_text()))):
            lengths[f"{path.relative_to(ROOT)}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert "tests/aot_fragments.py:gemm" in lengths
    assert not {name: length for name, length in lengths.items() if length > 80}


def test_nothing_foreign():
    found = []
    for path in files():
        if path.suffix in (".png", ".so", ".pt", ".gz"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number} holds {what}: {line.strip()[:100]}"
                      for what, pattern in FOREIGN.items() if re.search(pattern, line)]  # fmt: skip
    assert not found, "\n".join(found)


def test_nothing_unexpected_at_the_top():
    assert not {path.relative_to(ROOT).parts[0] for path in files()} - TOP_LEVEL


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a path of one machine", 'open("/' + 'home/someone/x")'),
        ("a package registry", "--extra-index" + "-url somewhere"),
        ("a document that is not here", "see " + "METHODS" + " §1"),
        ("the making of it", "closes " + "issue" + " 2"),
        ("unfinished work", "# TO" + "DO"),
    ],
)
def test_what_is_foreign_is_recognised(what, line):
    assert [name for name, pattern in FOREIGN.items() if re.search(pattern, line)] == [what]


def test_the_package_init_holds_the_public_names_and_nothing_else():
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text())
    docstring, *body = tree.body
    assert isinstance(docstring, ast.Expr) and ast.get_docstring(tree)
    imported, assigned = [], {}
    for node in body:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"line {node.lineno}: only this package is imported"
            imported += [alias.asname or alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.Assign), f"line {node.lineno}: neither an import nor __all__ nor __version__"
            assigned[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    assert assigned.keys() == {"__all__", "__version__"}
    assert sorted(imported) == sorted(set(assigned["__all__"]) - {"__version__"})


def public_names() -> list[tuple[str, str]]:
    """(module, name) for every function and class in an ``__all__`` of the package."""
    found = []
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found += [(name, public) for public in ast.literal_eval(node.value) if public != "__version__"]
    return sorted(found)


def test_every_public_name_exists_and_is_documented():
    assert len(public_names()) > 20
    undocumented = []
    for module, name in public_names():
        value = getattr(__import__(module, fromlist=[name]), name)
        if (inspect.isclass(value) or inspect.isroutine(value)) and not (value.__doc__ or "").strip():
            undocumented.append(f"{module}.{name}")
    assert not undocumented


@pytest.mark.parametrize("name", sorted(set(clora_kernels.__all__) - {"__version__"}))
def test_public_docstrings_tell_the_errors(name):
    """Of a function what it raises, of a module what its constructor raises; a record only holds what others check."""
    value = getattr(clora_kernels, name)
    documentation = [inspect.getdoc(value) or ""]
    if inspect.isclass(value):
        if hasattr(value, "__dataclass_fields__") or issubclass(value, tuple):
            return
        documentation.append(inspect.getdoc(value.__init__) or "")
    assert re.search(r"(?i)\braises?\b", " ".join(documentation)), f"{name} does not say what it raises"
