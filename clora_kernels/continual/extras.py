"""Optional packages, asked for where they are used."""

from __future__ import annotations

import importlib.util


def require(*packages: str, extra: str = "demo") -> None:
    """Check that packages of an extra can be imported, without importing them.

    Raises:
        ImportError: naming those that are missing and the command that installs them.
    """
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise ImportError(f"needs {', '.join(missing)}, not installed here: pip install 'clora_kernels[{extra}]'")
