"""What a run was started with, as ``config.json`` in its folder holds it: by which packages, and with what."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__

VERSIONS = "versions"


def versions() -> dict[str, str]:
    """Of the packages that decide what a run computes; of transformers where it is installed."""
    found = {"clora_kernels": __version__, "torch": str(torch.__version__)}
    try:
        return {**found, "transformers": metadata.version("transformers")}
    except metadata.PackageNotFoundError:
        return found


def read_config(file: Path) -> dict[str, Any]:
    """What the file holds.

    Raises:
        ValueError: no JSON object is in it.
    """
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"path: got {str(file)!r}, which is no JSON object") from None


def check_config(mine: Mapping[str, Any], theirs: Mapping[str, Any], where: str, growing: Collection[str]) -> None:
    """``mine`` is ``theirs``, that of the run in ``where``, but that the lists named in ``growing`` may be longer.

    Raises:
        ValueError: naming what differs.
    """
    absent = object()
    other = [
        f"{key} ({', '.join('absent' if c is absent else repr(c) for c in values)})"
        for key in sorted((theirs.keys() | mine.keys()) - {VERSIONS})
        if (values := (mine.get(key, absent), theirs.get(key, absent)))[0] != values[1]
        and not (key in growing and _begins_with(*values))
    ]
    if other:
        if growing:
            other[-1] += f"; {', '.join(sorted(growing))} may be longer, but must begin as there"
        raise ValueError(f"config: differs from that of the run in {where!r} in (got, expected) {'; '.join(other)}")


def _begins_with(longer: Any, start: Any) -> bool:
    return isinstance(longer, list) and isinstance(start, list) and longer[: len(start)] == start


def warn_of_versions(theirs: Mapping[str, Any], where: str) -> None:
    """Warn where packages are not those that the run in ``where`` was started with, if it tells."""
    if theirs.get(VERSIONS) not in (None, versions()):
        warnings.warn(
            f"versions: the run in {where!r} was started with {theirs[VERSIONS]}, now there are {versions()}: it may "
            "not go on bit for bit",
            UserWarning,
            stacklevel=3,
        )
