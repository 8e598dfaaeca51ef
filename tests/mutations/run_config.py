"""Mutants of what a run was started with, and of what may differ when it goes on."""

from .mutant import mutants_of

RUN_CONFIG = mutants_of(
    "clora_kernels/continual/run_config.py",
    "run-config",
    ("tests/test_continual_run_config.py", "tests/test_continual_run_directory.py"),
    [
        ("unchecked", "a run is resumed with another config", "    if other:\n", "    if False:\n"),
        ("absent-key-unseen", "a key that the run was not started with is not compared",
         "for key in sorted((theirs.keys() | mine.keys()) - {VERSIONS})",
         "for key in sorted(theirs.keys() - {VERSIONS})"),
        ("anything-grows", "every list may be longer", "and not (key in growing and ", "and not ("),
        ("another-start", "a list that may grow may be any other", "longer[: len(start)] == start", "bool(longer)"),
        ("shorter", "a list that may grow may be shorter",
         "longer[: len(start)] == start", "longer[: len(start)] == start[: len(longer)]"),
        ("versions-unseen", "nobody is told of other versions",
         "not in (None, versions()):", "is versions:"),
        ("versions-compared", "a run under other versions is refused", " - {VERSIONS})", ")"),
    ],
)  # fmt: skip
RUN_CONFIG += mutants_of(
    "clora_kernels/continual/run_directory.py",
    "run-config",
    ("tests/test_continual_run_config.py",),
    [
        ("not-grown", "a run that grew is still that of before", "            if new != theirs:\n",
         "            if not theirs:\n"),
        ("versions-of-now", "a resumed run forgets what it was started by",
         "{**theirs, **mine} if going_on", "{**theirs, **mine, VERSIONS: versions()} if going_on"),
    ],
)  # fmt: skip
