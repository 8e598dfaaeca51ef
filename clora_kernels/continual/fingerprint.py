"""Which weights a method was attached to: adapters and folds mean nothing on others of the same shapes."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping

import torch
from torch import Tensor, nn

SAMPLE = 32  # rows and columns of a weight that are looked at, at most


def fingerprints(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """layer → CRC-32 of some thousand of its weight's values, evenly spread, as fp64: 0-dim int64 on the CPU. It is the
    same on every device, and in every dtype that holds the values. Layers without values are left out: quantised ones,
    those on the device "meta"."""
    weights = {name: layer._parameters.get("weight") for name, layer in layers.items()}
    return {
        name: _fingerprint(weight.detach())
        for name, weight in weights.items()
        if weight is not None and weight.is_floating_point() and not weight.is_meta
    }


def _fingerprint(weight: Tensor) -> Tensor:
    rows, columns = (slice(None, None, max(1, -(-n // SAMPLE))) for n in weight.shape)
    return torch.tensor(zlib.crc32(array("d", weight[rows, columns].double().flatten().tolist())))
