r"""What routed LoRA computes, in plain PyTorch.

Forward, with W = weightᵀ, A = lora_Aᵀ, B = lora_Bᵀ and drop(x) = mask ⊙ x (mask holds 0 and 1/(1−p)):

    p = drop(x)·A                     [M, r]
    q = p ⊙ gate                      [M, r]
    C = s·(R_frozen + R)·B            [r, N]
    y = x·W + q·C + b                 [M, N]     (+ base_output, where a base layer already ran)

Backward. The frozen routing counts in dx and dgate; lora_A and lora_B learn through the live routing alone
(C-LoRA, arXiv 2502.17920, Theorem 3.1), so with C_live = s·R·B:

    h = dy·Cᵀ         h_live = dy·C_liveᵀ        U = qᵀ·dy
    dx = dy·Wᵀ + mask ⊙ ((h ⊙ gate)·Aᵀ)          dgate = p ⊙ h          summed to the gate's shape
    dA = drop(x)ᵀ·(h_live ⊙ gate)                dB = s·Rᵀ·U            dR = s·U·Bᵀ
    dW = xᵀ·dy        db = Σ_m dy                ds = ⟨U, (R_frozen + R)·B⟩

With a bank of routings [T, r, r] and routing_index [S] the routing acts on the [M, r] side, sample by sample (t =
t(m)):

    C = s·B           q′ = q·(R_frozen + R)_t    y = x·W + q′·C + b
    h′ = dy·Cᵀ        h = h′·(R_frozen + R)_tᵀ   h_live = h′·R_tᵀ
    dB = s·(q·R_t)ᵀ·dy                           dR_t = Σ_{m of t} q_mᵀ·h′_m          ds = ⟨q′ᵀ·dy, B⟩

Without a routing the identity stands in its place.

Rounding contract: the operands of every large matmul are rounded to x.dtype once, sums are fp32 (fp64 for fp64 inputs),
each output is rounded once. Both functions below keep it, so run in bf16 they show the error that no kernel can avoid,
and run on inputs converted to fp64 they are the truth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dropout_mask import dropout_mask, kept_value


class Gradients(NamedTuple):
    """Gradients in the order of the public function's tensor arguments; None for an argument that was not given."""

    x: Tensor
    weight: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    routing: Tensor | None
    bias: Tensor | None
    gate: Tensor | None
    scaling: Tensor
    base_output: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over operands of ``dtype``: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def keep_mask(x: Tensor, dropout_p: float, dropout_seed: Tensor | None) -> tuple[Tensor, float] | None:
    """drop(x) = mask ⊙ x as (which elements are kept, bool in the shape of x; what a kept one counts); None: nothing
    drops."""
    if dropout_p == 0.0 or dropout_seed is None:
        return None
    threshold = round(65536 * dropout_p)
    kept = dropout_mask(
        dropout_seed, torch.tensor(threshold, device=x.device), 0, x.shape[:-1].numel(), x.shape[-1]
    ).reshape(x.shape)
    return kept, kept_value(threshold)


def apply_routing(q: Tensor, routing: Tensor, routing_index: Tensor) -> Tensor:
    """q [S, ..., r] times routing[routing_index] [S, r, r], sample by sample."""
    samples = q.reshape(q.shape[0], q.shape[1:-1].numel(), q.shape[-1])
    return (samples @ routing[routing_index.long()]).reshape(q.shape)


def _add_opt(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


def forward(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    routing: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    frozen_routing: Tensor | None = None,
    routing_index: Tensor | None = None,
    gate: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    base_output: Tensor | None = None,
) -> Tensor:
    """y [..., N] of the equations above, differentiable by autograd any number of times.

    Autograd gives the gradients listed above: the frozen routing enters dx, dgate and ds, not dA and dB.
    """
    acc = accumulation_dtype(x.dtype)
    x_acc = x.to(acc)

    def operand(t: Tensor) -> Tensor:
        # autograd passes the rounding by: a gradient that went through the cast would be rounded to x.dtype itself
        exact = t.to(acc)
        return exact if x.dtype == acc else exact + (exact.to(x.dtype).to(acc) - exact).detach()

    def gated(source: Tensor, A: Tensor, gate: Tensor | None) -> Tensor:
        p = (source * kept) @ operand(A).mT * value
        return p if gate is None else p * gate.to(acc)

    def routed(q: Tensor, R: Tensor | None) -> Tensor:
        if R is None or routing_index is None:
            return operand(q)
        return operand(apply_routing(q, R, routing_index))

    kept, value = keep_mask(x, dropout_p, dropout_seed) or (1.0, 1.0)
    s = scaling.to(acc) if isinstance(scaling, Tensor) else torch.tensor(scaling, dtype=acc, device=x.device)
    A, B = lora_A, lora_B.to(acc).mT
    live = None if routing is None else routing.to(acc)
    if frozen_routing is None:
        total = live
        C = s * B if live is None or routing_index is not None else s * (live @ B)
        low_rank = routed(gated(x_acc, A, gate), total) @ operand(C)
    else:
        # dx, dgate, dR and ds see the whole; A and B learn through the live routing alone. The terms that bring their
        # gradients are exactly zero in value.
        frozen = frozen_routing.to(acc)
        total = frozen + live
        q = gated(x_acc, A.detach(), gate)
        q_of_A = gated(x_acc.detach(), A, None if gate is None else gate.detach())
        if routing_index is None:
            C = s * (live @ B) + s * (frozen @ B.detach())
            C_live = (s * (live @ B)).detach()
            low_rank = operand(q) @ operand(C) + _zero_valued(operand(q_of_A) @ operand(C_live))
        else:
            C = operand(s * B.detach())
            low_rank = routed(q, total) @ C
            low_rank = low_rank + _zero_valued(routed(q_of_A, live.detach()) @ C.detach())
            low_rank = low_rank + _zero_valued(routed(q.detach(), live.detach()) @ operand(s.detach() * B))
    y = low_rank if weight is None else x_acc @ operand(weight).mT + low_rank
    y = _add_opt(y, None if bias is None else bias.to(acc))
    y = _add_opt(y, None if base_output is None else base_output.to(acc))
    return y.to(x.dtype if base_output is None else base_output.dtype)


def _zero_valued(t: Tensor) -> Tensor:
    return t - t.detach()


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    routing: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    frozen_routing: Tensor | None = None,
    routing_index: Tensor | None = None,
    gate: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    base_output: Tensor | None = None,
) -> Gradients:
    """The gradients of the equations above, derived by hand, for dy [..., N]; each in the dtype of its argument."""
    acc = accumulation_dtype(x.dtype)
    r = lora_A.shape[0]
    lead = x.shape[:-1]

    def operand(t: Tensor) -> Tensor:
        return t.to(x.dtype).to(acc)

    def flat(t: Tensor) -> Tensor:
        return t.reshape(lead.numel(), t.shape[-1])

    def per_sample(t: Tensor, R: Tensor) -> Tensor:
        return flat(apply_routing(t.reshape(*lead, r), R, routing_index))

    mask = keep_mask(x, dropout_p, dropout_seed)
    kept, value = (1.0, 1.0) if mask is None else (flat(mask[0]), mask[1])
    s = scaling.to(acc) if isinstance(scaling, Tensor) else torch.tensor(scaling, dtype=acc, device=x.device)
    A, B = operand(lora_A), lora_B.to(acc).mT
    bank = routing_index is not None
    live = torch.eye(r, dtype=acc, device=x.device) if routing is None else routing.to(acc)
    total = live if frozen_routing is None else live + frozen_routing.to(acc)
    gates = None if gate is None else flat(gate.to(acc).expand(*lead, r))

    x_flat, dy_flat = flat(x.to(acc)), flat(operand(dy))
    dropped = x_flat * kept
    p = (dropped @ A.mT) * value
    q = p if gates is None else p * gates
    C = s * B if bank else s * (total @ B)

    h_prime = dy_flat @ operand(C).mT
    if bank:
        h, h_live = per_sample(h_prime, total.mT), per_sample(h_prime, live.mT)
        U = operand(per_sample(q, live)).mT @ dy_flat
        dB = s * U
        rows = lead[1:].numel()
        per_sample_dR = q.reshape(lead[0], rows, r).mT @ h_prime.reshape(lead[0], rows, r)
        one_hot = torch.nn.functional.one_hot(routing_index.long(), live.shape[0]).to(acc)
        dR = (one_hot.mT @ per_sample_dR.flatten(1)).reshape(live.shape)
        ds = ((operand(per_sample(q, total)).mT @ dy_flat) * B).sum()
    else:
        h, h_live = h_prime, dy_flat @ operand(s * (live @ B)).mT
        U = operand(q).mT @ dy_flat
        dB, dR, ds = s * (live.mT @ U), s * (U @ B.mT), (U * (total @ B)).sum()

    g, g_live = (h, h_live) if gates is None else (h * gates, h_live * gates)
    dx = (operand(g * value) @ A) * kept
    if weight is not None:
        dx = dx + dy_flat @ operand(weight)
    dA = operand(g_live * value).mT @ dropped
    dgate = None if gate is None else (p * h).reshape(*lead, r).sum_to_size(gate.shape).to(gate.dtype)
    return Gradients(
        x=dx.reshape(x.shape).to(x.dtype),
        weight=None if weight is None else (dy_flat.mT @ x_flat).to(weight.dtype),
        lora_A=dA.to(lora_A.dtype),
        lora_B=dB.mT.to(lora_B.dtype),
        routing=None if routing is None else dR.to(routing.dtype),
        bias=None if bias is None else flat(dy.to(acc)).sum(0).to(bias.dtype),
        gate=dgate,
        scaling=ds.to(scaling.dtype if isinstance(scaling, Tensor) else acc),
        base_output=None if base_output is None else dy.to(base_output.dtype),
    )
