"""The adapter added into the weight."""

from __future__ import annotations

from torch import Tensor

from ...kernels.routed_lora.algebra import Projection
from ...library import without_autocast
from ...reference.routed_lora import accumulation_dtype
from .arguments import check_projection, check_shape, check_tensor, scaling_tensor


def merge_routed_lora(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    routing: Tensor | None = None,
    *,
    frozen_routing: Tensor | None = None,
    gate: Tensor | None = None,
    scaling: float | Tensor = 1.0,
) -> Tensor:
    """The weight whose frozen linear equals the routed LoRA layer::

        weight + scaling · lora_B · (frozen_routing + routing)ᵀ · diag(gate) · lora_A

    Args:
        weight: ``[N, K]``; not changed.
        lora_A, lora_B, routing, frozen_routing, scaling: as in :func:`routed_lora_linear`; ``routing`` is one ``[r,
            r]``.
        gate: ``[r]``; a gate that differs by sample or token has no merged weight.

    Returns:
        ``[N, K]`` in the dtype of ``weight``: products and the sum in fp32 (fp64 for an fp64 weight), rounded once. The
        fp32 copy takes 4·N·K bytes while it runs; rows can be merged block by block, each with its rows of lora_B.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected (N, K) = (out_features, in_features)")
    if isinstance(routing, Tensor) and routing.dim() == 3:
        raise ValueError(f"routing: got a bank of shape {tuple(routing.shape)}, expected one (r, r)")
    s = scaling_tensor(scaling, weight)
    projection = Projection(weight, lora_A, lora_B, routing, frozen_routing, None, None, None, None, s, None, None)
    check_projection(weight, projection)
    if gate is not None:
        check_tensor("gate", gate, weight.device)
        check_shape("gate", gate, (lora_A.shape[0],), "(rank,); no gate by sample or token can be merged")
    acc = accumulation_dtype(weight.dtype)
    with without_autocast(weight):
        small = lora_B.to(acc)
        if routing is not None:
            total = routing.to(acc) if frozen_routing is None else routing.to(acc) + frozen_routing.to(acc)
            small = small @ total.mT
        if gate is not None:
            small = small * gate.to(acc)
        return (weight.to(acc) + (small * s) @ lora_A.to(acc)).to(weight.dtype)
