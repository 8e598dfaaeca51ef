"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass

# The tests of what routed LoRA computes: first the quickest, then the ones that notice most.
NUMBERS = tuple(
    f"tests/test_routed_lora_{what}.py"
    for what in ("primitives", "parity", "needs", "options", "dropout", "group", "layouts", "transforms", "merge")
)


@dataclass(frozen=True)
class Mutant:
    """``file`` with ``old``, which stands there once, replaced by ``new``; ``tests``, patterns of files, must notice.

    ``gpu``: only a GPU can tell, as where a synchronisation is left out.
    """

    id: str
    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]
    gpu: bool = False


def mutants_of(
    file: str, prefix: str, tests: tuple[str, ...], rows: list[tuple[str, str, str, str]], gpu: bool = False
) -> list[Mutant]:
    """The mutants of one file, each row (id, what, old, new)."""
    return [Mutant(f"{prefix}-{name}", file, what, old, new, tests, gpu) for name, what, old, new in rows]
