"""One nn.Linear that holds several projections (a fused qkv), with a LoRA on some of them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import AdapterLinear
from .layer import RoutedLoRALinear


class RoutedLoRAFusedLinear(RoutedLoRALinear):
    """A routed LoRA on slices of the output of one linear layer, with one product of x and the whole weight.

    Slice j is the columns ``slices[j] = (start, stop)`` of y and has an adapter of rank r of its own. Together they are
    one routed LoRA of rank n·r whose C is block-diagonal, so the call is that of :class:`RoutedLoRALinear`: one read of
    x, one dropout draw. A gate has n·r entries, slice by slice.

    Parameters: lora_A ``[n·r, K]``, lora_B ``[Σ widths, r]``, routing and frozen_routing ``[n, r, r]``, each slice
    after slice.

    Args:
        slices: ascend and do not overlap.
        Everything else as in :class:`RoutedLoRALinear`; there is no bank of routings.

    Raises:
        ValueError: no slices, slices that overlap, descend or leave the output; a bank; what RoutedLoRALinear raises.
    """

    slices: tuple[tuple[int, int], ...]

    def __init__(
        self, in_features: int, out_features: int, r: int, *, slices: Sequence[tuple[int, int]], **options: Any
    ) -> None:
        self._set_slices(slices, out_features)
        super().__init__(in_features, out_features, r, **options)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls, linear: nn.Module, r: int, *, slices: Sequence[tuple[int, int]], **options: Any
    ) -> RoutedLoRAFusedLinear:
        """As :meth:`RoutedLoRALinear.from_linear`, with its options, on these slices of the layer's output."""
        self = cls._around(linear)
        self._set_slices(slices, self.out_features)
        self._add_adapter(r, **options)
        return self

    def _set_slices(self, slices: Sequence[tuple[int, int]], out_features: int) -> None:
        try:
            pairs = [(operator.index(start), operator.index(stop)) for start, stop in slices]
        except (TypeError, ValueError):
            raise ValueError(f"slices: got {slices!r}, expected (start, stop) pairs of ints") from None
        edges = [edge for pair in pairs for edge in pair]
        inside = edges and edges[0] >= 0 and edges[-1] <= out_features
        if not inside or any(a > b for a, b in itertools.pairwise(edges)) or any(a == b for a, b in pairs):
            raise ValueError(
                f"slices: got {pairs}, expected ascending (start, stop) pairs that do not overlap, within "
                f"0..{out_features}"
            )
        self.slices = tuple(pairs)

    def _adapter_shapes(self, routing: bool | int) -> dict[str, tuple[int, ...]]:
        if not isinstance(routing, bool):
            raise ValueError(f"routing: got {routing!r}, expected True or False; a fused layer has no bank of routings")
        n = len(self.slices)
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (n * self.r, self.in_features),
            "lora_B": (sum(stop - start for start, stop in self.slices), self.r),
        }
        return {**shapes, "routing": (n, self.r, self.r)} if routing else shapes

    def adapter_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """As one routed LoRA of rank n·r: lora_A, block-placed lora_B ``[N, n·r]``, block-diagonal routings."""
        routing, frozen = (None if R is None else torch.block_diag(*R) for R in (self.routing, self.frozen_routing))
        return self.lora_A, self._placed(self._parts(self.lora_B)), routing, frozen

    def lora_tensors(self) -> tuple[Tensor, Tensor]:
        lora_A, lora_B = super().lora_tensors()
        return lora_A, self._placed(self._parts(lora_B))

    def _parts(self, lora_B: Tensor) -> list[Tensor]:
        return list(lora_B.split([stop - start for start, stop in self.slices]))

    def _placed(self, parts: list[Tensor]) -> Tensor:
        n, rows, end = len(parts), [], 0
        for j, (part, (start, stop)) in enumerate(zip(parts, self.slices, strict=True)):
            rows.append(part.new_zeros(start - end, n * self.r))
            rows.append(F.pad(part, (j * self.r, (n - 1 - j) * self.r)))
            end = stop
        rows.append(parts[0].new_zeros(self.out_features - end, n * self.r))
        return torch.cat(rows)

    def _routed_B(self, total: Tensor) -> Tensor:
        return torch.cat([part.to(R.dtype) @ R.mT for part, R in zip(self._parts(self.lora_B), total, strict=True)])

    def check_mergeable(self) -> None:
        """The leading dimension of ``routing`` counts slices, not tasks: it has one merged weight."""
        AdapterLinear.check_mergeable(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slices={list(self.slices)}"
