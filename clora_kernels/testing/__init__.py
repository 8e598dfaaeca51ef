"""Proof on your own device: parity with fp64, adapter fidelity, orthogonality, the state of memory, what really ran."""

from .fidelity import Fidelity, adapter_fidelity, adapter_term, assert_fidelity
from .integrity import guarded, guarded_outputs, poisoned_empty, saved_tensors, unchanged
from .memory import peak_memory
from .parity import Deviation, Expected, Reference, assert_parity, compare, evaluate
from .timing import Rounds, Spread, take_turns
from .tracing import dispatched, launches
from .zoo import HardMatrix, Orthogonality, assert_orthonormal, hard_matrices, mixed_batch, orthogonality

__all__ = [
    "Deviation",
    "Expected",
    "Fidelity",
    "HardMatrix",
    "Orthogonality",
    "Reference",
    "Rounds",
    "Spread",
    "adapter_fidelity",
    "adapter_term",
    "assert_fidelity",
    "assert_orthonormal",
    "assert_parity",
    "compare",
    "dispatched",
    "evaluate",
    "guarded",
    "guarded_outputs",
    "hard_matrices",
    "launches",
    "mixed_batch",
    "orthogonality",
    "peak_memory",
    "poisoned_empty",
    "saved_tensors",
    "take_turns",
    "unchanged",
]
