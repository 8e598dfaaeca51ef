r"""What a pool of rank-1 experts computes, in plain PyTorch.

Expert e of E is the pair of row a_e of experts_A [E, K] and row b_e of experts_B [E, N]. Row m of x uses k of them,
those of the indices of its sample (indices [S, k]) or its own (indices [..., k]): e = index(m, i) for i = 1 .. k.

    p_mi = x_m·a_e                                   [M, k]
    q_mi = s·g_mi·p_mi                               [M, k]
    y_m  = Σ_i q_mi·b_e        (+ base_output_m)     [M, N]

Backward, with the sums over those (m, i) whose expert is e, and Σ_l over the rows that share a gate:

    h_mi = dy_m·b_e            c_mi = s·g_mi·h_mi    [M, k]
    dx_m = Σ_i c_mi·a_e        da_e = Σ c_mi·x_m     db_e = Σ q_mi·dy_m
    dg   = s·Σ_l p·h           ds   = Σ g·p·h        dbase = dy

An expert that is chosen several times by one row counts as often.

Rounding contract: the operands x, dy, A, B, q and c of the products are rounded to x.dtype once, sums are fp32 (fp64
for fp64 x), each output is rounded once. Both functions below keep it, so run in bf16 they show the error that no
kernel can avoid, and run on inputs converted to fp64 they are the truth. They gather a copy of the chosen rows, [M, k,
K] and [M, k, N]: this is the form that the kernels replace.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .routed_lora import accumulation_dtype


class Gradients(NamedTuple):
    """Gradients in the order of the public function's tensor arguments; None for an argument that was not given."""

    x: Tensor
    experts_A: Tensor
    experts_B: Tensor
    gates: Tensor | None
    scaling: Tensor
    base_output: Tensor | None


def of_rows(t: Tensor, x: Tensor) -> Tensor:
    """Indices or gates [S, k] or [..., k] as those of every row of x [..., K], [M, k]."""
    lead, k = x.shape[:-1], t.shape[-1]
    if t.dim() == 2 and x.dim() > 2:
        t = t.reshape(t.shape[0], *[1] * (x.dim() - 2), k).expand(*lead, k)
    return t.reshape(lead.numel(), k)


def forward(
    x: Tensor,
    experts_A: Tensor,
    experts_B: Tensor,
    indices: Tensor,
    gates: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    base_output: Tensor | None = None,
) -> Tensor:
    """y [..., N] of the equations above, differentiable by autograd any number of times."""
    acc = accumulation_dtype(x.dtype)

    def operand(t: Tensor) -> Tensor:
        # autograd passes the rounding by: a gradient that went through the cast would be rounded to x.dtype itself
        exact = t.to(acc)
        return exact if x.dtype == acc else exact + (exact.to(x.dtype).to(acc) - exact).detach()

    rows = of_rows(indices, x).long()
    # converted before they are chosen: autograd then adds up their gradients in the dtype of sums
    A, B = operand(experts_A)[rows], operand(experts_B)[rows]
    p = (A @ x.reshape(rows.shape[0], x.shape[-1], 1).to(acc))[..., 0]
    q = p * scaling if gates is None else p * of_rows(gates, x).to(acc) * scaling
    y = (operand(q)[:, None, :] @ B).reshape(*x.shape[:-1], experts_B.shape[1])
    return y.to(x.dtype) if base_output is None else (base_output.to(acc) + y).to(base_output.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    experts_A: Tensor,
    experts_B: Tensor,
    indices: Tensor,
    gates: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    base_output: Tensor | None = None,
) -> Gradients:
    """The gradients of the equations above, derived by hand, for dy [..., N]; each in the dtype of its argument."""
    acc = accumulation_dtype(x.dtype)

    def operand(t: Tensor) -> Tensor:
        return t.to(x.dtype).to(acc)

    def summed(coefficients: Tensor, rows_of: Tensor, experts: Tensor) -> Tensor:
        products = (coefficients[..., None] * rows_of[:, None, :]).flatten(0, 1)
        total = torch.zeros(experts.shape, dtype=acc, device=x.device)
        return total.index_add_(0, rows.flatten(), products).to(experts.dtype)

    rows = of_rows(indices, x).long()
    M = rows.shape[0]
    x_rows, dy_rows = x.to(acc).reshape(M, x.shape[-1]), operand(dy).reshape(M, dy.shape[-1])
    A, B = operand(experts_A[rows]), operand(experts_B[rows])
    g = torch.ones((), dtype=acc, device=x.device) if gates is None else of_rows(gates, x).to(acc)
    p, h = (A @ x_rows[..., None])[..., 0], (B @ dy_rows[..., None])[..., 0]
    q, c = operand(scaling * g * p), operand(scaling * g * h)
    ph = p * h
    dgates = None
    if gates is not None:
        lead = gates.shape[:-1].numel()
        dgates = (
            (scaling * ph).reshape(lead, M // max(lead, 1), gates.shape[-1]).sum(1).reshape(gates.shape).to(gates.dtype)
        )
    return Gradients(
        x=(c[:, None, :] @ A).reshape(x.shape).to(x.dtype),
        experts_A=summed(c, x_rows, experts_A),
        experts_B=summed(q, dy_rows, experts_B),
        gates=dgates,
        scaling=(g * ph).sum().to(scaling.dtype if isinstance(scaling, Tensor) else acc),
        base_output=None if base_output is None else dy.to(base_output.dtype),
    )
