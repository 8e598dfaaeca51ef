"""``python -m clora_kernels info``, ``selftest``, ``kernels`` and ``tune``."""

from __future__ import annotations

import argparse
import sys

import torch

from . import tune
from .kernels import aot
from .report import info
from .selftest import selftest


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 if all is well."""
    parser = argparse.ArgumentParser(prog="python -m clora_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, compiled parts and backends, and why one is missing")
    test = commands.add_parser(
        "selftest", help="parity, fidelity, orthogonality and speed on this machine, in some 20 seconds"
    )
    test.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    test.add_argument("--seconds", type=float, default=20.0, help="after which no timing begins (default: %(default)g)")
    aot.add_arguments(
        commands.add_parser("kernels", help="compile the Triton kernels for GPUs that need not be here, and judge them")
    )
    tune.add_arguments(
        commands.add_parser("tune", help="measure on this GPU which tiles to use, and which calls triton is faster for")
    )
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        print(info())
        return 0
    if arguments.command == "kernels":
        return aot.run(arguments)
    if arguments.command == "tune":
        return tune.run(arguments)
    try:
        device = torch.device(arguments.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    report = selftest(device, arguments.seconds)
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
