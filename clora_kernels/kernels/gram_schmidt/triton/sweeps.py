"""``sweeps``: one or two sweeps of Cholesky-QR, each matrix as many as it needs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra import Columns
from .products import MOST_COLUMNS, combine_into, inner_parts
from .step import Work, step


def sweeps(columns: Columns, rank_tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Q, R in fp32 and the states after two sweeps at most; six launches, eight beside a basis. Scratch for the second
    sweep: V in fp32 where V is 16-bit or has more than one block of columns, else Q is swept in its place."""
    V, P = columns
    Q, work = torch.empty_like(V), Work.empty(columns)
    in_place = V.dtype == torch.float32 and V.shape[2] <= MOST_COLUMNS
    swept = Q if in_place else torch.empty(V.shape, dtype=torch.float32, device=V.device)
    again = work.state[0]
    beside = [] if P is None or work.t is None else [(P, work.t)]
    G, S = inner_parts(V, V), None if P is None else inner_parts(P, V)
    step(G, S, rank_tol, work, False)
    combine_into(Q, [(V, work.x), *beside], again, None if in_place else swept)
    inner_parts(swept, swept, G, again)
    if P is not None:
        inner_parts(P, swept, S, again)
    step(G, S, rank_tol, work, True)
    combine_into(Q, [(swept, work.x), *beside], again, second=True)
    return Q, work.R, work.state[1]
