"""Routed LoRA forward and backward, written once over five primitives that a backend brings.

Notation as in ``reference.routed_lora``. The low-rank side is folded before anything large is touched:

    pack     A [r, K] and C = s·(R_frozen + R)·B [r, N] (with a bank C = s·B), rounded once to x.dtype
    shrink   a big operand times a small one, gated:  x → q = (drop(x)·A) ⊙ gate,  dy → g = (dy·Cᵀ) ⊙ gate     [M, r]
    linear   y = x·W + q·C + b,   dx = Σ dy·Wᵀ + mask ⊙ (g·Aᵀ)                                      the large output
    reduce   a small operand against a big one over M:  dA = gᵀ·drop(x),  U = qᵀ·dy            [r, K], [r, N], unrounded
    unpack   dB = s·Rᵀ·U, dR = s·U·Bᵀ, ds

so backward runs the same primitives as forward. A layer is one projection of x; a group is several, and reads x once.
Of forward's work q [M, r] is kept for backward, rounded as it is, or p = drop(x)·A unrounded where a gate or a bank
needs it; C and the dropout mask are made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...reference.routed_lora import accumulation_dtype
from ..views import cast, flatten, unflatten
from .banks import per_sample, routing_gradients


class Projection(NamedTuple):
    """The tensors of one routed LoRA; shapes as in the public function, ``scaling`` and ``threshold`` 0-dim."""

    weight: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    routing: Tensor | None
    frozen_routing: Tensor | None
    routing_index: Tensor | None
    gate: Tensor | None
    bias: Tensor | None
    base_output: Tensor | None
    scaling: Tensor
    seed: Tensor | None
    threshold: Tensor | None

    @property
    def bank(self) -> bool:
        return self.routing_index is not None


class Needs(NamedTuple):
    """Which gradients of a projection are wanted, in the order in which they come back."""

    weight: bool
    lora_A: bool
    lora_B: bool
    routing: bool
    gate: bool
    bias: bool
    scaling: bool

    @property
    def of_U(self) -> bool:
        return self.lora_B or self.routing or self.scaling

    @property
    def of_forward(self) -> bool:
        """Whether backward reads what forward kept."""
        return self.of_U or self.gate


class Dropout(NamedTuple):
    """A draw of drop(x); kernels make the 0/1 mask from it and leave out the value of what is kept."""

    seed: Tensor
    threshold: Tensor

    def kept_value(self, acc: torch.dtype) -> Tensor:
        """1/(1 − threshold/65536), 0 where everything drops; 0-dim, without a host sync."""
        kept = 65536.0 / (65536 - self.threshold).clamp(min=1).to(acc)
        return kept * (self.threshold < 65536)


class Term(NamedTuple):
    """One product of ``shrink``: sum = (mask ⊙ big)·smallᵀ [M, r], with the draw's mask if ``masked``, else without."""

    small: Tensor
    dropout: Dropout | None
    masked: bool
    gate: Tensor | None
    want_sum: bool
    want_gated: bool


class Packed(NamedTuple):
    """The small operands of a projection, rounded: A [r, K], C [r, N], and C_live, C without the frozen routing."""

    A: Tensor | None
    C: Tensor | None
    C_live: Tensor | None


class Primitives(Protocol):
    """What a backend brings. ``small`` operands come rounded to the big operand's dtype."""

    def pack(self, j: Projection, dtype: torch.dtype, A: bool, C: bool, C_live: bool) -> Packed: ...

    def shrink(self, big: Tensor, terms: list[Term]) -> list[tuple[Tensor | None, Tensor | None]]:
        """For each term, where wanted: the sum in the accumulation dtype, and sum · kept value ⊙ gate in big.dtype."""

    def linear(
        self,
        products: list[tuple[Tensor, Tensor]],
        low_rank: list[tuple[Tensor, Tensor, Dropout | None]],
        bias: Tensor | None = None,
        base_output: Tensor | None = None,
    ) -> Tensor: ...

    def reduce(self, small: list[Tensor], big: Tensor, dropout: list[Dropout | None]) -> list[Tensor]: ...

    def unpack(self, j: Projection, U: Tensor, need: Needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...


def _dropout(j: Projection) -> Dropout | None:
    return None if j.seed is None or j.threshold is None else Dropout(j.seed, j.threshold)


def total_routing(j: Projection, acc: torch.dtype) -> Tensor | None:
    """R_frozen + R in the accumulation dtype; None for the identity."""
    if j.routing is None or j.frozen_routing is None:
        return None if j.routing is None else cast(j.routing, acc)
    return cast(j.routing, acc) + cast(j.frozen_routing, acc)


def keeps_p(j: Projection) -> bool:
    """Whether backward gets p, unrounded, and not q."""
    return j.gate is not None or j.routing_index is not None


def _gate(j: Projection, acc: torch.dtype, lead: torch.Size) -> Tensor | None:
    """The gate as [M, r]; a view where strides allow one."""
    if j.gate is None:
        return None
    return flatten(cast(j.gate, acc).expand(*lead, j.lora_A.shape[0]))


def apply_gate(t: Tensor, dropout: Dropout | None, gate: Tensor | None) -> Tensor:
    """t · kept value ⊙ gate, for t [M, r] in the accumulation dtype."""
    t = t if dropout is None else t * dropout.kept_value(t.dtype)
    return t if gate is None else t * gate


def forward(kernels: Primitives, x: Tensor, projections: list[Projection]) -> tuple[list[Tensor], list[Tensor]]:
    """ys [..., N_j] of several projections of one x [..., K], and what each keeps for backward: q or p [M, r_j]."""
    dtype, lead = x.dtype, x.shape[:-1]
    acc = accumulation_dtype(dtype)
    x_flat = flatten(x)
    packs = [kernels.pack(j, dtype, True, True, False) for j in projections]
    terms = []
    for j, packed in zip(projections, packs, strict=True):
        terms.append(Term(packed.A, _dropout(j), True, _gate(j, acc, lead), keeps_p(j), not j.bank))
    ys, kept = [], []
    for j, packed, term, (p, q) in zip(projections, packs, terms, kernels.shrink(x_flat, terms), strict=True):
        if j.bank:
            q = apply_gate(p, term.dropout, term.gate)
            q = per_sample(q, total_routing(j, acc), j.routing_index).to(dtype)
        products = [] if j.weight is None else [(x_flat, j.weight.mT)]
        base = None if j.base_output is None else flatten(j.base_output)
        y = kernels.linear(products, [(q, packed.C, None)], j.bias, base)
        ys.append(unflatten(y, lead))
        kept.append(p if keeps_p(j) else q)
    return ys, kept


def backward(
    kernels: Primitives,
    dys: list[Tensor],
    x: Tensor | None,
    projections: list[Projection],
    kept: list[Tensor],
    need_x: bool,
    needs: Sequence[Needs],
    dtype: torch.dtype,
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """dx [..., K] and, for every projection, its gradients in the order of ``Needs``; None for what is not wanted."""
    lead = dys[0].shape[:-1]
    x_flat = None if x is None else flatten(x)
    sides = [
        _low_rank_side(kernels, cast(flatten(dy), dtype), x_flat, lead, j, of_forward, need_x, need)
        for dy, j, of_forward, need in zip(dys, projections, kept, needs, strict=True)
    ]
    dx = None
    if need_x:
        products = [(s.dy, j.weight) for s, j in zip(sides, projections, strict=True) if j.weight is not None]
        low_rank = [(s.g, s.A, _dropout(j)) for s, j in zip(sides, projections, strict=True)]
        dx = kernels.linear(products, low_rank)
        dx = unflatten(dx, lead)
    learning = [i for i, need in enumerate(needs) if need.lora_A]
    dA: dict[int, Tensor] = {}
    if learning:
        small, dropouts = [sides[i].g_live for i in learning], [_dropout(projections[i]) for i in learning]
        grads = kernels.reduce(small, x_flat, dropouts)
        dA = {i: cast(g, projections[i].lora_A.dtype) for i, g in zip(learning, grads, strict=True)}
    return dx, [[s.dweight, dA.get(i), s.dB, s.dR, s.dgate, s.dbias, s.dscaling] for i, s in enumerate(sides)]


class _Side(NamedTuple):
    """What ``_low_rank_side`` finds."""

    dy: Tensor
    A: Tensor | None
    g: Tensor | None
    g_live: Tensor | None
    dweight: Tensor | None
    dB: Tensor | None
    dR: Tensor | None
    dgate: Tensor | None
    dbias: Tensor | None
    dscaling: Tensor | None


def _low_rank_side(
    kernels: Primitives,
    dy: Tensor,
    x: Tensor | None,
    lead: torch.Size,
    j: Projection,
    of_forward: Tensor,
    need_x: bool,
    need: Needs,
) -> _Side:
    """Everything of backward but dx and dA: what reads dy [M, N] alone, and dW."""
    acc = accumulation_dtype(dy.dtype)
    gate, dropout = _gate(j, acc, lead), _dropout(j)
    # p and the q of U; q stands unrounded where a bank still has to route it
    p = q = of_forward
    if keeps_p(j) and need.of_forward:
        q = apply_gate(p, dropout, gate)
        q = q if j.bank else cast(q, dy.dtype)
    split = j.frozen_routing is not None and need.lora_A
    reads_g = need_x or (need.lora_A and not split)
    whole = reads_g or need.gate
    wants = (need_x, whole or (j.bank and (split or need.routing)), split and not j.bank)
    packed = kernels.pack(j, dy.dtype, *wants) if any(wants) else Packed(None, None, None)
    h = g = g_live = dB = dR = dscaling = None
    if j.bank:
        h, g, g_live, dB, dR, dscaling = _bank_side(kernels, dy, j, packed.C, q, gate, dropout, need_x, need, split)
    else:
        terms = [Term(packed.C, dropout, False, gate, need.gate, reads_g)] if whole else []
        terms += [Term(packed.C_live, dropout, False, gate, False, True)] if split else []
        found = kernels.shrink(dy, terms) if terms else []
        if found:
            (h, g), g_live = found[0], found[-1][1]
        if need.of_U:
            (U,) = kernels.reduce([q], dy, [None])
            dB, dR, dscaling = kernels.unpack(j, U, need)
    dgate = None
    if need.gate:
        dgate = (apply_gate(p, dropout, None) * h).reshape(*lead, p.shape[-1])
        dgate = dgate.sum_to_size(j.gate.shape).to(j.gate.dtype)
    dbias = dy.sum(0, dtype=acc).to(j.bias.dtype) if need.bias else None
    dweight = dy.mT @ x if need.weight else None
    return _Side(dy, packed.A, g, g_live, dweight, dB, dR, dgate, dbias, dscaling)


def _bank_side(
    kernels: Primitives,
    dy: Tensor,
    j: Projection,
    C: Tensor | None,
    q: Tensor,
    gate: Tensor | None,
    dropout: Dropout | None,
    need_x: bool,
    need: Needs,
    split: bool,
) -> tuple[Tensor | None, ...]:
    """h, g, g_live, dB, dR_t for every t and ds, where each sample takes its own routing on the [M, r] side."""
    acc, dtype, index = accumulation_dtype(dy.dtype), dy.dtype, j.routing_index
    total, live = total_routing(j, acc), j.routing.to(acc)
    h = h_prime = g = g_live = dB = dR = dscaling = None
    if C is not None:
        ((h_prime, _),) = kernels.shrink(dy, [Term(C, None, False, None, True, False)])
        h = per_sample(h_prime, total.mT, index)
        g = apply_gate(h, dropout, gate).to(dtype) if need_x or need.lora_A else None
        g_live = apply_gate(per_sample(h_prime, live.mT, index), dropout, gate).to(dtype) if split else g
    small = {}
    if need.lora_B:
        small["live"] = per_sample(q, live, index).to(dtype)
    if need.scaling:
        small["total"] = per_sample(q, total, index).to(dtype)
    U = dict(zip(small, kernels.reduce(list(small.values()), dy, [None] * len(small)), strict=True)) if small else {}
    if need.lora_B:
        dB = (U["live"].mT * j.scaling).to(j.lora_B.dtype)
    if need.scaling:
        dscaling = (U["total"].mT * j.lora_B.to(acc)).sum().to(j.scaling)
    if need.routing:
        dR = routing_gradients(q, h_prime, index, live.shape[0]).to(j.routing.dtype)
    return h, g, g_live, dB, dR, dscaling
