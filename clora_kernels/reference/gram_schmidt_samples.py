"""Sample inputs of Gram-Schmidt: keyword arguments of ``reference.gram_schmidt.forward`` and of the public function.

Sizes are different and divide nothing. Dependent columns stand between independent ones and repeat several of them, so
that a wrong order, row or column shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def make_inputs(
    lead: Sequence[int] = (3,),
    d: int = 41,
    r: int = 7,
    *,
    k: int = 0,
    against_lead: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    against_dtype: torch.dtype | None = None,
    dependent: Sequence[int] = (),
    noise: float = 0.0,
    rank_tol: float | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments for V ``[*lead, d, r]``.

    Args:
        k: columns of ``against``, orthonormal in fp64; 0 for none.
        against_lead: its leading dimensions, those of V if None.
        against_dtype: of ``against``; fp32 if None, fp64 beside an fp64 V. In 16 bit its columns are unit vectors,
            which are orthonormal there too.
        dependent: columns that are sums of all columns before them and of those of ``against`` ..
        noise: .. plus this much of something else.
        rank_tol: None leaves it out.
        seed: of the values, which are the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    V = normal(*lead, d, r)
    P = torch.linalg.qr(normal(*(lead if against_lead is None else against_lead), d, k)).Q if k else None
    if against_dtype is not None and against_dtype.itemsize == 2 and P is not None:
        P = torch.eye(d, dtype=torch.float64)[:, torch.randperm(d, generator=generator)[:k]].expand(P.shape)
    for j in dependent:
        other = V[..., j].clone()
        earlier = V[..., :j] if P is None else torch.cat([V[..., :j], P.expand(*lead, d, k)], -1)
        V[..., j] = (earlier * (1 + torch.rand(earlier.shape[-1], generator=generator, dtype=torch.float64))).sum(-1)
        V[..., j] += noise * other
    inputs: dict[str, Any] = {"V": V.to(dtype).to(device)}
    if P is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inputs["against"] = P.to(against_dtype or wide).to(device)
    if rank_tol is not None:
        inputs["rank_tol"] = rank_tol
    return inputs


def sample_inputs(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Named cases that together use every option that changes what is computed."""
    wide = {"dependent": (2, 5), "noise": 1e-4, "rank_tol": 1e-2}
    options: dict[str, dict[str, Any]] = {
        "one_matrix": {"lead": ()},
        "batch": {"lead": (5,)},
        "many_leads": {"lead": (2, 1, 3)},
        "no_matrix": {"lead": (0, 3)},
        "no_rows": {"d": 0},
        "no_columns": {"r": 0},
        "one_column": {"r": 1},
        "one_row": {"d": 1, "r": 1},
        "square": {"d": 7},
        "wide": {"d": 5, "r": 7},
        "against": {"k": 6},
        "against_one_column": {"k": 1},
        "against_for_all": {"k": 6, "against_lead": ()},
        "against_broadcast": {"lead": (2, 3), "k": 4, "against_lead": (2, 1)},
        "against_bf16": {"k": 4, "against_dtype": torch.bfloat16, "against_lead": (3,)},
        "against_complete": {"d": 9, "k": 9, "rank_tol": 1e-2},
        "dependent": wide,
        "dependent_first_of_against": {"k": 5, "dependent": (0, 4), "noise": 1e-4, "rank_tol": 1e-2},
        "dependent_against": {**wide, "k": 5},
        "dependent_exactly": {"dependent": (3,)} if dtype.itemsize > 2 else wide,
    }
    for seed, (name, chosen) in enumerate(options.items()):
        yield name, make_inputs(dtype=dtype, device=device, seed=seed, **chosen)
    inputs = make_inputs((3,), 26, 10, k=8, dtype=dtype, device=device, seed=99)
    transposed = inputs["V"].mT.contiguous().mT
    yield "strided", {"V": transposed[..., ::2, ::2], "against": inputs["against"][..., ::2, :0]}
