"""The table of mutants fits the code, every part of it is broken in many ways, and one mutant of each kernel dies."""

import ast
from collections import Counter
from pathlib import Path

import mutants as runner
import pytest
from mutations import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
KERNELS = [m for m in runner.one_per_file(MUTANTS) if m.file.startswith("clora_kernels/kernels/")]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_each_mutant_breaks_the_code_in_one_place(mutant):
    text = (ROOT / mutant.file).read_text()
    broken = runner.mutated(mutant, text)
    assert broken != text and any(list(ROOT.glob(pattern)) for pattern in mutant.tests)
    if mutant.file.endswith(".py"):
        assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(text))


def test_every_file_has_four_mutants_and_the_large_ones_a_dozen():
    broken = Counter(mutant.file for mutant in MUTANTS)
    for folder in ("kernels", "autograd", "dispatch"):
        for path in sorted((ROOT / "clora_kernels" / folder).rglob("*.py")):
            # the judges of compiled kernels are proved by fragments that break
            if path.name not in ("__init__.py", "declared.py", "aot.py", "ttgir.py", "choice.py"):
                assert broken[str(path.relative_to(ROOT))] >= 4, f"hardly a mutant breaks {path.name}"
    assert (
        broken["clora_kernels/kernels/routed_lora/algebra.py"] >= 48
    )  # four kernels' worth: forward, dx, dA, dB and dR
    for kernel in ("pack", "unpack", "shrink", "reduce", "linear", "linear_kernels", "common"):
        assert broken[f"clora_kernels/kernels/routed_lora/triton/{kernel}.py"] >= 12
    for file in ("kernels/routed_lora/aten.py", "autograd/routed_lora/function.py", "reference/dropout_mask.py"):
        assert broken[f"clora_kernels/{file}"] >= 12


def test_a_text_that_is_in_no_mutant_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mutants.py", "--only", "nothing of the kind"])
    with pytest.raises(SystemExit):
        runner.main()
    assert "--only: got 'nothing of the kind'" in capsys.readouterr().err


def test_ids_are_unique():
    assert not {name: count for name, count in Counter(m.id for m in MUTANTS).items() if count > 1}


def test_the_committed_table_is_of_these_mutants_and_none_survived():
    lines = [line for line in runner.TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    rows = [tuple(line[2:-2].split(" | ")) for line in lines]
    assert [row[:3] for row in rows] == [(m.id, m.file, m.what) for m in MUTANTS]
    verdicts = {name: verdict for name, _, _, verdict in rows}
    assert {name for name, verdict in verdicts.items() if verdict == "only on a GPU"} == {
        m.id for m in MUTANTS if m.gpu
    }
    assert not {name: verdict for name, verdict in verdicts.items() if verdict.startswith("**")}
    tests = {name: verdict.strip("`") for name, verdict in verdicts.items() if "::" in verdict}
    assert runner.killers() == tests
    assert all((ROOT / test.split("::")[0]).is_file() for test in tests.values())


def test_one_mutant_a_kernel_dies():
    assert len(KERNELS) == len({m.file for m in KERNELS}) >= 3
    outcomes = runner.run(KERNELS, jobs=2)
    assert {done.mutant.id: done.state for done in outcomes} == {mutant.id: "killed" for mutant in KERNELS}
    assert all("::test_" in done.by for done in outcomes)


def test_a_mutant_that_changes_nothing_survives(tmp_path):
    """Else the runner would call anything dead."""
    same = Mutant(
        "comment",
        "clora_kernels/kernels/dropout_mask.py",
        "nothing",
        "import torch\n",
        "import torch  # nothing is broken\n",
        ("tests/test_testing_integrity.py",),
    )
    assert runner.outcome(same).state == "survived"
    for passing in ("test_launches_says_that_triton_is_missing", "test_that_is_not_there"):
        assert runner.outcome(same, first=f"{same.tests[0]}::{passing}").state == "survived"
    with pytest.raises(ValueError, match="holds 0 times"):
        runner.mutated(same, "")
    unmatched = Mutant("none", same.file, "no test", same.old, same.new, ("tests/no_such_*.py",))
    assert runner.outcome(unmatched).state == "error"
