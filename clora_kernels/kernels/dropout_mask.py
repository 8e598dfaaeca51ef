"""The dropout mask by the compiled operator where it is built for the device, else by the plain PyTorch definition."""

import torch

from .. import extension
from ..reference import dropout_mask as reference

__all__ = ["dropout_mask"]


def dropout_mask(seed: torch.Tensor, threshold: torch.Tensor, first_row: int, rows: int, columns: int) -> torch.Tensor:
    """Bool [rows, columns], True where kept: rows ``first_row ..`` of the mask, the same bits on every path.

    seed, threshold: 0-dim int64 tensors (threshold in 0..65536, on the seed's device; for a CUDA seed also on the
    CPU). Raises what the path raises: RuntimeError (compiled), ValueError or TypeError (plain PyTorch).
    """
    if extension.has_op("dropout_mask", seed.device.type):
        return torch.ops.clora_kernels.dropout_mask.default(seed, threshold, first_row, rows, columns)
    if seed.device.type in ("cpu", "cuda"):  # for others nothing is there to be built
        extension.warn_once("dropout_mask", seed.device.type)
    return reference.dropout_mask(seed, threshold, first_row, rows, columns)


if extension.has_op("dropout_mask", "cpu") or extension.has_op("dropout_mask", "cuda"):

    @torch.library.register_fake("clora_kernels::dropout_mask")
    def _(seed: torch.Tensor, threshold: torch.Tensor, first_row: int, rows: int, columns: int) -> torch.Tensor:
        return seed.new_empty((rows, columns), dtype=torch.bool)
