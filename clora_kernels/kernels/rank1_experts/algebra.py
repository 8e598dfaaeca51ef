r"""Rank-1 experts forward and backward, written once over primitives that a backend brings.

Letters as in ``reference.rank1_experts``. Rows lie flattened: x [M, K] with M = G·L, where the L rows of a group share
one row of the indices [G, k] and of the gates: groups are samples where indices are per sample, and single rows (L = 1)
where they are per token. Either side of an expert is a row of a pool, so three primitives serve both directions:

    shrink    p = rows of x with the chosen rows of A     h = rows of dy with the chosen rows of B      [M, k]
    expand    y = Σ q·(chosen rows of B)                  dx = Σ c·(chosen rows of A)                   [M, n]
    reduce    dA = Σ c·x over the choosers of a row       dB = Σ q·dy                                   [E, n]
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...reference.routed_lora import accumulation_dtype
from ..views import cast


class Call(NamedTuple):
    """x [M, K], experts_A [E, K], experts_B [E, N], indices [G, k] within the pool, gates [G, k] or None, a 0-dim
    scaling, base_output [M, N] or None."""

    x: Tensor
    experts_A: Tensor
    experts_B: Tensor
    indices: Tensor
    gates: Tensor | None
    scaling: Tensor
    base_output: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted, in the order of :class:`Call`; that of base_output is dy itself."""

    x: bool = False
    experts_A: bool = False
    experts_B: bool = False
    gates: bool = False
    scaling: bool = False

    @property
    def p(self) -> bool:
        """Whether backward reads p."""
        return self.experts_B or self.gates or self.scaling

    @property
    def h(self) -> bool:
        """Whether backward computes h."""
        return self.x or self.experts_A or self.gates or self.scaling


class Order(NamedTuple):
    """The choices (group, slot) by expert: ``order`` [G·k], positions in indices.flatten(), those of expert e from
    ``starts[e]`` to ``starts[e + 1]``, in their own order; ``starts`` [E + 1]. Integers of the backend's choice."""

    order: Tensor
    starts: Tensor


class Primitives(Protocol):
    """What a backend brings. Sums are in the accumulation dtype of x, which is that of ``small``."""

    def shrink(self, big: Tensor, experts: Tensor, indices: Tensor) -> Tensor:
        """Each row of big [M, n] times the rows of experts [E, n] that its group chose, unrounded: [M, k]."""

    def expand(
        self, small: Tensor, experts: Tensor, indices: Tensor, base: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """For each row the sum of the chosen rows of experts [E, n] times small [M, k], and base [M, n], rounded once:
        [M, n] in ``dtype``, that of x, or in that of base."""

    def order(self, indices: Tensor, experts: int) -> Any:
        """What reduce must know of indices [G, k] into a pool of so many experts."""

    def reduce(self, small: Tensor, big: Tensor, indices: Tensor, order: Any, experts: Tensor) -> Tensor:
        """For each expert the sum of the rows of big [M, n] that chose it times small [M, k], in a fixed order, rounded
        once: shape and dtype of ``experts``; zero for one that nobody chose."""


def forward(kernels: Primitives, call: Call) -> tuple[Tensor, Tensor]:
    """y [M, N] in the dtype of base_output, else of x; and p [M, k] in the accumulation dtype."""
    p = kernels.shrink(call.x, call.experts_A, call.indices)
    y = kernels.expand(_weighted(p, call), call.experts_B, call.indices, call.base_output, call.x.dtype)
    return y, p


def backward(kernels: Primitives, dy: Tensor, call: Call, p: Tensor | None, need: Needs) -> tuple[Tensor | None, ...]:
    """The gradients of x, experts_A, experts_B, gates and scaling, each in the dtype of its argument; None for one that
    is not needed. p is that of forward, needed if ``need.p``."""
    dy = cast(dy, call.x.dtype)
    dx = dA = dB = dgates = dscaling = None
    order = kernels.order(call.indices, call.experts_A.shape[0]) if need.experts_A or need.experts_B else None
    if need.h:
        h = kernels.shrink(dy, call.experts_B, call.indices)
        if need.x or need.experts_A:
            c = _weighted(h, call)
            if need.x:
                dx = kernels.expand(c, call.experts_A, call.indices, None, call.x.dtype)
            if need.experts_A:
                dA = kernels.reduce(c, call.x, call.indices, order, call.experts_A)
        if p is not None and (need.gates or need.scaling):
            dgates, dscaling = _of_weights(p * h, call, need)
    if p is not None and need.experts_B:
        dB = kernels.reduce(_weighted(p, call), dy, call.indices, order, call.experts_B)
    return dx, dA, dB, dgates, dscaling


def _of_weights(ph: Tensor, call: Call, need: Needs) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of gates and of scaling for p·h [M, k]."""
    G = call.indices.shape[0]
    of_each = ph if ph.shape[0] == G else of_groups(ph, G).sum(1)
    dgates = dscaling = None
    if need.gates and call.gates is not None:
        dgates = cast(of_each * call.scaling, call.gates.dtype)
    if need.scaling:
        weighted = of_each if call.gates is None else of_each * cast(call.gates, ph.dtype)
        dscaling = weighted.sum().to(call.scaling)
    return dgates, dscaling


def gather(kernels: Primitives, experts: Tensor, indices: Tensor, gates: Tensor | None) -> Tensor:
    """The chosen rows of experts [E, n] for indices [G, k], times gates: [G, k, n] in the dtype of experts."""
    small = _ones(experts, indices) if gates is None else cast(gates, accumulation_dtype(experts.dtype)).reshape(-1, 1)
    rows = kernels.expand(small, experts, indices.reshape(-1, 1), None, experts.dtype)
    return rows.reshape(*indices.shape, experts.shape[1])


def gather_backward(
    kernels: Primitives, d: Tensor, experts: Tensor, indices: Tensor, gates: Tensor | None, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of experts and of gates for d [G, k, n], the gradient of :func:`gather`."""
    alone, rows = indices.reshape(-1, 1), cast(d, experts.dtype).reshape(-1, experts.shape[1])
    dexperts = dgates = None
    if need[0]:
        small = _ones(experts, indices) if gates is None else cast(gates, accumulation_dtype(d.dtype)).reshape(-1, 1)
        dexperts = kernels.reduce(small, rows, alone, kernels.order(alone, experts.shape[0]), experts)
    if need[1] and gates is not None:
        dgates = cast(kernels.shrink(rows, experts, alone).reshape(gates.shape), gates.dtype)
    return dexperts, dgates


def _ones(experts: Tensor, indices: Tensor) -> Tensor:
    return experts.new_ones(indices.numel(), 1, dtype=accumulation_dtype(experts.dtype))


def of_groups(t: Tensor, groups: int) -> Tensor:
    """Rows [M, n] as [G, L, n]."""
    return t.reshape(groups, t.shape[0] // max(groups, 1), t.shape[1])


def _weighted(t: Tensor, call: Call) -> Tensor:
    """s·g·t for t [M, k]."""
    if call.gates is not None:
        gates = cast(call.gates, t.dtype)
        # a view costs what a few products cost, so there is none where each row has gates of its own
        one_each = gates.shape == t.shape
        t = t * gates if one_each else (of_groups(t, gates.shape[0]) * gates[:, None, :]).reshape(t.shape)
    return t * call.scaling
