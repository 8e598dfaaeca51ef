r"""How much of an adapter is in the output: what parity alone cannot see when the adapter is a thousandth of y.

    α = ⟨y − x·W − b, δ⟩ / ⟨δ, δ⟩          δ = s·((drop(x)·A) ⊙ gate)·(R_frozen + R)·B

with δ and x·W summed in fp64 over the operands as the rounding contract rounds them. α is 1 for an adapter that came
through whole, 0 for one that was lost. Rounding y leaves in element i an error that is as good as uniform over one
spacing of y's dtype at |y_i|, of variance spacing(y_i)²/12 and independent of the other elements, so α scatters
around 1 with

    σ² = Σ_i δ_i²·spacing(y_i)²/12 / (Σ_i δ_i²)².

A bias may be added to a sum that is rounded already; its spacing then counts likewise. An output passes if
|α − 1| ≤ 4σ + 2⁻⁹. Rounding errors are independent only where x·W varies: with W = 0 leave out the bias too, for a
column of one constant and a tiny adapter rounds the same way in every row, whoever computes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference.routed_lora import apply_routing, keep_mask


@dataclass(frozen=True)
class Fidelity:
    """``alpha``: the adapter's strength in the output; ``sigma``: how far rounding alone scatters it."""

    alpha: float
    sigma: float

    @property
    def bound(self) -> float:
        return 4 * self.sigma + 2.0**-9

    @property
    def ok(self) -> bool:
        return abs(self.alpha - 1) <= self.bound

    def __str__(self) -> str:
        return f"adapter fidelity {self.alpha:.5f}, sigma {self.sigma:.1e} (expected 1 within {self.bound:.1e})"


@torch.no_grad()
def adapter_term(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    routing: Tensor | None = None,
    *,
    frozen_routing: Tensor | None = None,
    routing_index: Tensor | None = None,
    gate: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """δ [..., N] in fp64: A, q and C rounded to x.dtype as the contract says, every sum and product in fp64."""

    def rounded(t: Tensor) -> Tensor:
        return t.to(x.dtype).double()

    kept, kept_value = keep_mask(x, dropout_p, dropout_seed) or (1.0, 1.0)
    q = (x.double() * kept) @ rounded(lora_A).mT * kept_value
    if gate is not None:
        q = q * gate.double()
    C = lora_B.double().mT
    if routing is not None:
        total = routing.double() if frozen_routing is None else routing.double() + frozen_routing.double()
        if routing_index is None:
            C = total @ C
        else:
            q = apply_routing(q, total, routing_index)
    return rounded(q) @ rounded(C * scaling)


@torch.no_grad()
def adapter_fidelity(
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    routing: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    base_output: Tensor | None = None,
    **adapter: Any,
) -> Fidelity:
    """α and σ of an output ``y`` [..., N] of a layer with these arguments, those of the public functions.

    Args:
        base_output: stands in the place of x·W; one that was rounded to 16 bit counts as exact.
        **adapter: what else :func:`adapter_term` takes.

    Raises:
        ValueError: the adapter term is zero, for then nothing can be measured.
    """
    delta = adapter_term(x, lora_A, lora_B, routing, **adapter)
    energy = delta.square().sum().item()
    if energy == 0.0:
        raise ValueError("the adapter term is zero; a fidelity needs an adapter that does something")
    rest = y.double()
    variance = _spacing(rest, y.dtype).square()
    if bias is not None:
        rest = rest - bias.double()
        variance += _spacing(rest, y.dtype).square()
    if weight is not None:
        rest = rest - x.double() @ weight.to(x.dtype).double().mT
    if base_output is not None:
        rest = rest - base_output.double()
    alpha = (rest * delta).sum().item() / energy
    return Fidelity(alpha, math.sqrt((delta.square() * variance).sum().item() / 12) / energy)


def _spacing(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of the numbers of ``dtype`` around each element of the fp64 ``t``."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(t)  # |t| = fraction · 2**exponent with a fraction of at least 1/2
    return torch.ldexp(torch.full_like(t, info.eps / 2), exponent).clamp(min=info.tiny * info.eps)


def assert_fidelity(y: Tensor, x: Tensor, weight: Tensor | None, *args: Any, **kwargs: Any) -> Fidelity:
    """:func:`adapter_fidelity`, within |α − 1| ≤ 4σ + 2⁻⁹.

    Raises AssertionError if it is not, and ValueError if rounding hides the adapter so well that half of it could be
    missing unseen: such a case proves nothing and needs more elements or a larger adapter.
    """
    fidelity = adapter_fidelity(y, x, weight, *args, **kwargs)
    if fidelity.bound >= 0.5:
        raise ValueError(f"rounding hides the adapter: 4·sigma + 2^-9 = {fidelity.bound:.2g}, expected less than 0.5")
    if not fidelity.ok:
        raise AssertionError(str(fidelity))
    return fidelity
