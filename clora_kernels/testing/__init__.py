"""Proof on the user's own device: parity with fp64, adapter fidelity, what happens to memory, what really ran."""

from .fidelity import Fidelity, adapter_fidelity, adapter_term, assert_fidelity
from .integrity import guarded, guarded_outputs, poisoned_empty, saved_tensors, unchanged
from .memory import peak_memory
from .parity import Deviation, Expected, Reference, assert_parity, compare, evaluate
from .timing import Rounds, Spread, take_turns
from .tracing import dispatched, launches

__all__ = [
    "Deviation",
    "Expected",
    "Fidelity",
    "Reference",
    "Rounds",
    "Spread",
    "adapter_fidelity",
    "adapter_term",
    "assert_fidelity",
    "assert_parity",
    "compare",
    "dispatched",
    "evaluate",
    "guarded",
    "guarded_outputs",
    "launches",
    "peak_memory",
    "poisoned_empty",
    "saved_tensors",
    "take_turns",
    "unchanged",
]
