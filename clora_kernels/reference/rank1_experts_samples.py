"""Sample inputs of rank-1 experts: keyword arguments of ``reference.rank1_experts.forward`` and of the public function.

Every size is different and divides nothing, experts repeat within a row and some are never chosen, and neither scaling
nor gates are neutral: a stride, a transpose or a factor that is wrong shows.
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
    E: int = 17,
    k: int = 5,
    *,
    per_sample: bool = False,
    dtype: torch.dtype = torch.float32,
    experts_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype = torch.int64,
    gates: bool = True,
    scaling: float | None = 1.7,
    base_output: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments for x ``[*lead, K]``, with an output of about unit variance.

    Args:
        per_sample: indices and gates of shape ``[lead[0], k]`` instead of ``[*lead, k]``.
        experts_dtype: dtype of experts_A, experts_B, gates and scaling; that of x if None.
        scaling: None gives a 0-dim tensor.
        base_output: its dtype, None for none.
        seed: of the values, which are the same on every device.

    Returns:
        The arguments that are there, x first. Where E > 2 the last expert is never chosen.
    """
    generator = torch.Generator().manual_seed(seed)
    experts_dtype = experts_dtype or dtype

    def normal(shape: Sequence[int], sd: float = 1.0, dtype: torch.dtype = experts_dtype) -> Tensor:
        return (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * sd).to(dtype).to(device)

    chosen = (lead[0], k) if per_sample else (*lead, k)
    inputs: dict[str, Any] = {
        "x": normal([*lead, K], dtype=dtype),
        "experts_A": normal([E, K], K**-0.5),
        "experts_B": normal([E, N], k**-0.5),
        "indices": torch.randint(max(E - 1, 1) if E > 2 else E, chosen, generator=generator).to(index_dtype).to(device),
    }
    if gates:
        inputs["gates"] = normal(chosen, 0.3) + 1
    inputs["scaling"] = torch.tensor(1.7, dtype=experts_dtype, device=device) if scaling is None else scaling
    if base_output is not None:
        inputs["base_output"] = normal([*lead, N], dtype=base_output)
    return inputs


def sample_inputs(
    dtype: torch.dtype = torch.float32,
    experts_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Named cases that together use every option and every regime."""
    options: dict[str, dict[str, Any]] = {
        "per_token": {},
        "per_sample": {"per_sample": True},
        "no_gates": {"gates": False, "scaling": None},
        "no_gates_per_sample": {"gates": False, "per_sample": True},
        "int32": {"index_dtype": torch.int32, "scaling": None},
        "onto_base": {"base_output": dtype, "scaling": None},
        "onto_fp32_base": {"base_output": torch.float32, "per_sample": True},
        "one_expert_each": {"k": 1},
        "one_expert_at_all": {"E": 1, "k": 3},
        "every_expert": {"E": 6, "k": 6, "per_sample": True},
        "more_than_there_are": {"E": 4, "k": 9},
        "large_pool": {"E": 311, "k": 3},
        "large_pool_per_sample": {"E": 311, "k": 33, "per_sample": True, "scaling": None},
        "many_tokens": {"lead": (2, 150), "E": 23, "k": 2},
        "many_tokens_per_sample": {"lead": (2, 150), "E": 23, "k": 2, "per_sample": True},
        "wide": {"lead": (2, 3), "K": 515, "N": 1027, "E": 40},
        "one_row": {"lead": (1,)},
        "one_number": {"K": 1, "N": 1},
        "rows": {"lead": (23,)},
        "no_lead": {"lead": (), "E": 60, "k": 40},
        "many_leads": {"lead": (2, 3, 1, 5)},
        "many_leads_per_sample": {"lead": (2, 3, 1, 5), "per_sample": True},
        "no_rows": {"lead": (0, 7), "scaling": None},
        "no_rows_per_sample": {"lead": (0, 7), "per_sample": True, "base_output": dtype},
        "samples_without_rows": {"lead": (3, 0), "per_sample": True, "scaling": None},
    }
    for seed, (name, chosen) in enumerate(options.items()):
        yield name, make_inputs(dtype=dtype, experts_dtype=experts_dtype, device=device, seed=seed, **chosen)
    inputs = make_inputs((9, 4), 26, 34, 12, 6, dtype=dtype, experts_dtype=experts_dtype, device=device, seed=99)
    strided = {k: v if k == "indices" else _every_second(v) for k, v in inputs.items()}
    yield "strided", strided | {"indices": _every_second(inputs["indices"]) % strided["experts_A"].shape[0]}


def _every_second(value: Any) -> Any:
    """Half the elements of each dimension, so that no stride is the one a kernel would guess."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    transposed = value.transpose(0, -1).contiguous().transpose(0, -1)
    return transposed[tuple(slice(None, None, 2) for _ in value.shape)]
