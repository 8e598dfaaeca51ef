"""Routed LoRA forward and backward, written once over three primitives that a backend brings: shrink, linear, reduce.

Notation as in ``reference.routed_lora``. The low-rank side is folded before anything large is touched:

    fold     A [r, K] and C = s·(R_frozen + R)·B [r, N] (with a bank C = s·B), rounded once to x.dtype
    shrink   a big operand times a small one:  x → p = drop(x)·A,  dy → h = dy·Cᵀ              [M, r], unrounded
    linear   y = x·W + q·C + b,   dx = Σ dy·Wᵀ + mask ⊙ ((h ⊙ gate)·Aᵀ)                        the large output
    reduce   a small operand against a big one over M:  dA = gᵀ·drop(x),  U = qᵀ·dy            [r, K], [r, N], unrounded

so backward runs the same primitives as forward. A layer is one projection of x; a group is several, and reads x once.
Only p [M, r] is computed for backward; q, C and the dropout mask are made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...reference.routed_lora import accumulation_dtype

BANK_SCRATCH_BYTES = 64 << 20


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
    def of_p(self) -> bool:
        """Whether backward reads p."""
        return self.of_U or self.gate


class Dropout(NamedTuple):
    """A draw of drop(x); kernels make the 0/1 mask from it and leave out the value of what is kept."""

    seed: Tensor
    threshold: Tensor

    def kept_value(self, acc: torch.dtype) -> Tensor:
        """1/(1 − threshold/65536), 0 where everything drops; 0-dim, without a host sync."""
        kept = 65536.0 / (65536 - self.threshold).clamp(min=1).to(acc)
        return kept * (self.threshold < 65536)


class Primitives(Protocol):
    """What a backend brings. ``small`` operands come rounded to the big operand's dtype."""

    def shrink(self, big: Tensor, small: list[Tensor], dropout: list[Dropout | None]) -> list[Tensor]: ...

    def linear(
        self,
        products: list[tuple[Tensor, Tensor]],
        low_rank: list[tuple[Tensor, Tensor, Dropout | None]],
        bias: Tensor | None = None,
        base_output: Tensor | None = None,
    ) -> Tensor: ...

    def reduce(self, small: list[Tensor], big: Tensor, dropout: list[Dropout | None]) -> list[Tensor]: ...


def flatten(t: Tensor) -> Tensor:
    """[..., n] as [M, n]; a view wherever strides allow one, M = 0 included."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _dropout(j: Projection) -> Dropout | None:
    return None if j.seed is None or j.threshold is None else Dropout(j.seed, j.threshold)


def _total_routing(j: Projection, acc: torch.dtype) -> Tensor | None:
    if j.routing is None or j.frozen_routing is None:
        return None if j.routing is None else j.routing.to(acc)
    return j.routing.to(acc) + j.frozen_routing.to(acc)


def _fold(j: Projection, R: Tensor | None, dtype: torch.dtype) -> Tensor:
    """C = s·R·B [r, N] in ``dtype``, with products in the accumulation dtype; s·B where a bank routes on the [M, r]
    side."""
    acc = accumulation_dtype(dtype)
    B = j.lora_B.to(acc).mT
    routed = B if R is None or j.bank else R @ B
    return (routed * j.scaling).to(dtype)


def _sample_blocks(samples: int, r: int) -> Iterator[slice]:
    """Blocks of samples whose r×r matrices take ``BANK_SCRATCH_BYTES`` of fp32 at most; usually one."""
    size = max(BANK_SCRATCH_BYTES // (4 * r * r), 1)
    for start in range(0, samples, size):
        yield slice(start, start + size)


def _per_sample(t: Tensor, R: Tensor, index: Tensor) -> Tensor:
    """t [M, r] times R[index], one [r, r] a sample."""
    S, r = index.shape[0], t.shape[1]
    samples = t.reshape(S, t.shape[0] // max(S, 1), r)
    blocks = [samples[b] @ R.index_select(0, index[b]) for b in _sample_blocks(S, r)]
    return (torch.cat(blocks) if len(blocks) != 1 else blocks[0]).reshape(t.shape) if blocks else t


def _bank_gradient(q: Tensor, h_prime: Tensor, index: Tensor, T: int) -> Tensor:
    """Σ q_mᵀ·h′_m over the samples of each of T routings, [T, r, r]. A one-hot matmul: unlike index_add_ it sums in a
    fixed order."""
    S, r = index.shape[0], q.shape[1]
    q, h_prime = q.reshape(S, q.shape[0] // max(S, 1), r), h_prime.reshape(S, q.shape[0] // max(S, 1), r)
    one_hot = (torch.arange(T, device=q.device)[:, None] == index).to(q.dtype)
    dR = q.new_zeros(T, r * r)
    for b in _sample_blocks(S, r):
        dR.addmm_(one_hot[:, b], (q[b].mT @ h_prime[b]).reshape(-1, r * r))
    return dR.reshape(T, r, r)


def _gated(t: Tensor, gate: Tensor | None, lead: torch.Size) -> Tensor:
    if gate is None:
        return t
    return (t.reshape(*lead, t.shape[-1]) * gate).reshape(t.shape)


def forward(kernels: Primitives, x: Tensor, projections: list[Projection]) -> tuple[list[Tensor], list[Tensor]]:
    """ys [..., N_j] and ps [M, r_j] (accumulation dtype) of several projections of one x [..., K]."""
    acc, lead = accumulation_dtype(x.dtype), x.shape[:-1]
    x_flat = flatten(x)
    dropouts = [_dropout(j) for j in projections]
    ps = kernels.shrink(x_flat, [j.lora_A.to(x.dtype) for j in projections], dropouts)
    ps = [p if d is None else p * d.kept_value(acc) for p, d in zip(ps, dropouts, strict=True)]
    ys = []
    low_rank: list[tuple[Tensor, Tensor, Dropout | None]]
    for j, p in zip(projections, ps, strict=True):
        total = _total_routing(j, acc)
        q = _gated(p, None if j.gate is None else j.gate.to(acc), lead)
        if j.bank:
            q = _per_sample(q, total, j.routing_index)
        low_rank = [(q.to(x.dtype), _fold(j, total, x.dtype), None)]
        products = [] if j.weight is None else [(x_flat, j.weight.mT)]
        base = None if j.base_output is None else flatten(j.base_output)
        y = kernels.linear(products, low_rank, j.bias, base)
        ys.append(y.reshape(*lead, y.shape[-1]))
    return ys, ps


def backward(
    kernels: Primitives,
    dys: list[Tensor],
    x: Tensor | None,
    projections: list[Projection],
    ps: list[Tensor],
    need_x: bool,
    needs: list[Needs],
    dtype: torch.dtype,
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """dx [..., K] and, for every projection, its gradients in the order of ``Needs``; None for what is not wanted."""
    acc, lead = accumulation_dtype(dtype), dys[0].shape[:-1]
    x_flat = None if x is None else flatten(x)
    sides = [
        _low_rank_side(kernels, flatten(dy).to(dtype), x_flat, lead, j, p, need_x, need, acc)
        for dy, j, p, need in zip(dys, projections, ps, needs, strict=True)
    ]
    dx = None
    if need_x:
        products = [(s.dy, j.weight) for s, j in zip(sides, projections, strict=True) if j.weight is not None]
        low_rank = [(s.g, j.lora_A.to(dtype), _dropout(j)) for s, j in zip(sides, projections, strict=True)]
        dx = kernels.linear(products, low_rank).reshape(*lead, projections[0].lora_A.shape[1])
    learning = [i for i, need in enumerate(needs) if need.lora_A]
    dA: dict[int, Tensor] = {}
    if learning:
        small, dropouts = [sides[i].g_live for i in learning], [_dropout(projections[i]) for i in learning]
        grads = kernels.reduce(small, x_flat, dropouts)
        dA = {i: g.to(projections[i].lora_A.dtype) for i, g in zip(learning, grads, strict=True)}
    return dx, [[s.dweight, dA.get(i), s.dB, s.dR, s.dgate, s.dbias, s.dscaling] for i, s in enumerate(sides)]


class _Side(NamedTuple):
    dy: Tensor
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
    p: Tensor,
    need_x: bool,
    need: Needs,
    acc: torch.dtype,
) -> _Side:
    """Everything of backward but dx and dA: what reads dy [M, N] alone, and dW."""
    dtype = dy.dtype
    total = _total_routing(j, acc)
    live = None if j.routing is None else j.routing.to(acc)
    split = j.frozen_routing is not None and need.lora_A
    gate = None if j.gate is None else j.gate.to(acc)
    g = g_live = dR = dB = dgate = dscaling = h_prime = None

    if need_x or need.lora_A or need.gate or (j.bank and need.routing):
        folded = [_fold(j, total, dtype)] + ([_fold(j, live, dtype)] if split and not j.bank else [])
        h, *rest = kernels.shrink(dy, folded, [None] * len(folded))
        h_live = rest[0] if rest else h
        if j.bank:
            h_prime = h
            h = _per_sample(h_prime, total.mT, j.routing_index)
            h_live = _per_sample(h_prime, live.mT, j.routing_index) if split else h
        if need.gate:
            dgate = (p * h).reshape(*lead, p.shape[-1]).sum_to_size(j.gate.shape).to(j.gate.dtype)
        dropout = _dropout(j)
        kept_value = 1.0 if dropout is None else dropout.kept_value(acc)
        g = (_gated(h, gate, lead) * kept_value).to(dtype) if need_x or need.lora_A else None
        g_live = (_gated(h_live, gate, lead) * kept_value).to(dtype) if split else g

    if need.of_U:
        q = _gated(p, gate, lead)
        B = j.lora_B.to(acc)
        if j.bank:
            dB, dR, dscaling = _bank_gradients(kernels, dy, j, q, h_prime, total, live, need)
        else:
            (U,) = kernels.reduce([q.to(dtype)], dy, [None])
            if need.lora_B:
                dB = ((U.mT if live is None else U.mT @ live) * j.scaling).to(j.lora_B.dtype)
            if need.routing:
                dR = ((U @ B) * j.scaling).to(j.routing.dtype)
            if need.scaling:
                dscaling = (U.mT * (B if total is None else B @ total.mT)).sum().to(j.scaling)
    dbias = dy.sum(0, dtype=acc).to(j.bias.dtype) if need.bias else None
    dweight = dy.mT @ x if need.weight else None
    return _Side(dy, g, g_live, dweight, dB, dR, dgate, dbias, dscaling)


def _bank_gradients(
    kernels: Primitives,
    dy: Tensor,
    j: Projection,
    q: Tensor,
    h_prime: Tensor | None,
    total: Tensor,
    live: Tensor,
    need: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dB, dR_t for every t, and ds, where each sample takes its own routing."""
    dB = dR = dscaling = None
    small = {}
    if need.lora_B:
        small["live"] = _per_sample(q, live, j.routing_index).to(dy.dtype)
    if need.scaling:
        small["total"] = _per_sample(q, total, j.routing_index).to(dy.dtype)
    U = dict(zip(small, kernels.reduce(list(small.values()), dy, [None] * len(small)), strict=True)) if small else {}
    if need.lora_B:
        dB = (U["live"].mT * j.scaling).to(j.lora_B.dtype)
    if need.scaling:
        dscaling = (U["total"].mT * j.lora_B.to(q.dtype)).sum().to(j.scaling)
    if need.routing:
        dR = _bank_gradient(q, h_prime, j.routing_index, live.shape[0]).to(j.routing.dtype)
    return dB, dR, dscaling
