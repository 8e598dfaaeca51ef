"""Mutants of the warning that a compiled part is missing, and of who gives it."""

from .mutant import mutants_of

_TESTS = ("tests/test_missing_extension.py",)

EXTENSION = [
    *mutants_of(
        "clora_kernels/extension.py",
        "extension",
        _TESTS,
        [
            ("warns-always", "the missing binary is told at every call",
             "    if operation in _warned:\n", "    if not operation:\n"),
            ("one-for-all", "one operation warns for all", "    if operation in _warned:\n", "    if _warned:\n"),
            ("points-inside", "the warning points into the package",
             "stacklevel=_level_of_the_user()", "stacklevel=2"),
        ],
    ),
    *mutants_of(
        "clora_kernels/dispatch/routed_lora.py",
        "dispatch-missing",
        _TESTS,
        [
            ("silent", "what is missing is not told",
             "    if choice.reason == extension.CPU_MISSING:\n", "    if not choice:\n"),
            ("unreasoned", "explain does not say what is missing", "            why = why_not\n", ""),
            ("whatever-the-work", "what is missing is told of calls that ATen takes",
             'if why_not in ("", extension.CPU_MISSING) and (\n            backend == "native" or',
             'if why_not in ("", extension.CPU_MISSING) and (\n            why_not or backend == "native" or'),
        ],
    ),
    *mutants_of(
        "clora_kernels/dispatch/gram_schmidt.py",
        "gs-dispatch-missing",
        _TESTS,
        [
            ("silent", "what is missing is not told",
             "    if choice.reason == extension.CPU_MISSING:\n", "    if not choice:\n"),
            ("unreasoned", "explain does not say what is missing",
             "chosen, why_not = backend, missing", 'chosen, why_not = backend, ""'),
            ("whatever-the-reason", "what is missing is told in place of another reason",
             'missing = why_not if why_not == extension.CPU_MISSING else ""', "missing = extension.CPU_MISSING"),
        ],
    ),
]  # fmt: skip
