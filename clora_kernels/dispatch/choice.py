"""The outcome of a dispatch rule, and the errors of a backend that was named but cannot run."""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("auto", "reference", "aten", "triton", "native")


@dataclass(frozen=True)
class Choice:
    """``backend`` and ``strategy`` that run a call and ``reason``, a sentence for people."""

    backend: str
    strategy: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.strategy}): {self.reason}"


def unavailable(op: str, backend: str, reason: str) -> ValueError:
    """The error for a named backend that cannot run ``op``."""
    return ValueError(f"backend={backend!r} cannot run {op}: {reason}")


def check_backend(backend: str, *further: str) -> None:
    """Raise ValueError unless ``backend`` is one that every operation knows, or one of ``further``."""
    known = BACKENDS + further
    if backend not in known:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(map(repr, known))}")
