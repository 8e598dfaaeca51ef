"""``python -m clora_kernels tune``: which tiles the Triton kernels run with on this GPU, and where they beat ATen.

For each call, most valuable first, every candidate tile of every kernel it launches is proved (parity of y and all
gradients with fp64, adapter fidelity, scratch filled with NaN) and those that are right take turns on the clock; then
the whole call is timed against ATen. What is found is saved after each step in a table that ``auto`` reads, for this
GPU and these versions; the same command goes on where it was left. See ``kernels.routed_lora.tables``.
"""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
