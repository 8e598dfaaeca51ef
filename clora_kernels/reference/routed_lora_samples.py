"""Sample inputs of routed LoRA: keyword arguments of ``reference.routed_lora.forward`` and of the public functions.

Every size is different and divides nothing, routings are not symmetric, and neither scaling, gate nor bias is neutral:
a transpose, a stride or a factor that is wrong shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def make_inputs(
    lead: Sequence[int] = (3, 7),
    K: int = 41,
    N: int = 29,
    r: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    weight: bool = True,
    routing: bool = True,
    bank: int = 0,
    frozen: bool = False,
    bias: bool = True,
    gate: Sequence[int] | None = None,
    scaling: float | None = 1.7,
    dropout_p: float = 0.0,
    base_output: torch.dtype | None = None,
    strength: float = 1.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments for x ``[*lead, K]``, with x·W and the adapter of about unit variance.

    Args:
        adapter_dtype: dtype of lora_A, lora_B, routings, gate, bias and scaling; that of x if None.
        bank: number of routings in a bank, 0 for a single one; with ``routing=False`` there is none at all.
        gate: shape of the gate, None for none.
        scaling: None gives a 0-dim tensor.
        base_output: its dtype, None for none.
        strength: factor on the adapter. 0.001 gives one that 16-bit sums are prone to lose.
        seed: of the values, which are the same on every device.

    Returns:
        The arguments that are there, x first, with a fixed ``dropout_seed`` where dropout_p > 0.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter_dtype = adapter_dtype or dtype

    def normal(shape: Sequence[int], sd: float = 1.0, dtype: torch.dtype = adapter_dtype) -> Tensor:
        return (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * sd).to(dtype).to(device)

    inputs: dict[str, Any] = {"x": normal([*lead, K], dtype=dtype)}
    inputs["weight"] = normal([N, K], K**-0.5, dtype) if weight else None
    inputs["lora_A"] = normal([r, K], K**-0.5)
    inputs["lora_B"] = normal([N, r], strength * r**-0.5)
    shape = [bank, r, r] if bank else [r, r]
    if routing:
        inputs["routing"] = normal(shape, r**-0.5)
    if routing and frozen:
        inputs["frozen_routing"] = normal(shape, r**-0.5)
    if routing and bank:
        inputs["routing_index"] = torch.randint(bank, (lead[0],), generator=generator).to(device)
    if bias and weight:
        inputs["bias"] = normal([N])
    if gate is not None:
        inputs["gate"] = normal(gate, 0.3) + 1
    inputs["scaling"] = torch.tensor(1.7, dtype=adapter_dtype, device=device) if scaling is None else scaling
    if dropout_p:
        inputs |= {"dropout_p": dropout_p, "dropout_seed": torch.tensor(seed + 2**40 + 17, device=device)}
    if base_output is not None:
        inputs["base_output"] = normal([*lead, N], dtype=base_output)
    return inputs


def sample_inputs(
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Named cases that together use every option; with ``weight`` None the case is one of the adapter alone."""
    options: dict[str, dict[str, Any]] = {
        "plain_lora": {"routing": False, "bias": False},
        "routed": {"lead": (23,)},
        "everything": {"frozen": True, "gate": (3, 7, 5), "scaling": None, "dropout_p": 0.3},
        "gate_of_rank": {"gate": (5,)},
        "gate_of_one": {"gate": (1,), "routing": False},
        "gate_of_sample": {"gate": (3, 1, 5), "frozen": True},
        "gate_of_position": {"gate": (7, 5), "dropout_p": 0.5},
        "frozen": {"frozen": True, "scaling": None},
        "bank": {"bank": 4, "scaling": None},
        "bank_frozen": {"bank": 2, "frozen": True, "gate": (3, 1, 5), "dropout_p": 0.1, "scaling": None},
        "bank_of_vectors": {"lead": (11,), "bank": 3},
        "dropout": {"dropout_p": 0.1},
        "dropout_all": {"dropout_p": 1.0},
        "rank_1": {"r": 1, "scaling": None},
        "rank_above_sizes": {"r": 53, "frozen": True},
        "one_row": {"lead": (1,), "gate": (5,)},
        "no_rows": {"lead": (0, 7), "frozen": True, "gate": (5,), "scaling": None, "dropout_p": 0.3},
        "no_samples_of_bank": {"lead": (0, 7), "bank": 2},
        "no_lead": {"lead": ()},
        "many_leads": {"lead": (2, 3, 1, 5), "gate": (3, 1, 1, 5), "frozen": True},
        "delta": {"weight": False, "frozen": True, "gate": (3, 1, 5)},
        "delta_onto_base": {"weight": False, "base_output": dtype, "dropout_p": 0.3, "scaling": None},
        "delta_onto_fp32_base": {"weight": False, "base_output": torch.float32, "bank": 3},
    }
    for seed, (name, chosen) in enumerate(options.items()):
        yield name, make_inputs(dtype=dtype, adapter_dtype=adapter_dtype, device=device, seed=seed, **chosen)
    inputs = make_inputs((9, 4), 26, 34, 6, dtype=dtype, adapter_dtype=adapter_dtype, device=device, gate=(6,), seed=99)
    yield "strided", {name: _every_second(value) for name, value in inputs.items()}


def _every_second(value: Any) -> Any:
    """Half the elements of each dimension, so that no stride is the one a kernel would guess."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    transposed = value.transpose(0, -1).contiguous().transpose(0, -1)
    return transposed[tuple(slice(None, None, 2) for _ in value.shape)]
