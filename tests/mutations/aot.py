"""Mutants of the command that compiles the Triton kernels."""

from .mutant import mutants_of

AOT = mutants_of(
    "clora_kernels/kernels/aot.py",
    "aot",
    ("tests/test_report.py",),
    [
        ("package-untried", "a package that cannot be imported ends in a traceback",
         "        _declared(options.package)\n        import triton", "        import triton"),
        ("nothing-tried-is-right", "a package that cannot be imported passes",
         'print(f"{options.package}: {error}", file=sys.stderr)\n        return 1\n',
         'print(f"{options.package}: {error}", file=sys.stderr)\n        return 0\n'),
        ("told-among-the-results", "why nothing was tried goes among the results",
         'print(f"{options.package}: {error}", file=sys.stderr)', 'print(f"{options.package}: {error}")'),
        ("interpreted", "under the interpreter nothing is told",
         "except (ImportError, RuntimeError, ValueError) as error:", "except (ImportError, ValueError) as error:"),
        ("untested-untold", "a Triton that is not tested is not told",
         "    if note := untested(triton.__version__):\n", '    if note := "":\n'),
    ],
)  # fmt: skip
