"""The k best of very many experts at the cost of two short lists of keys."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...autograd.routed_lora.arguments import DTYPES
from ...library import without_autocast
from .arguments import check_count, check_rows
from .choosing import top_experts


class ProductKeyScores(nn.Module):
    """Product keys (Lample et al., *Large Memory Layers with Product Keys*, arXiv 1907.05242; for rank-1 experts PEER,
    arXiv 2407.04153): expert i·√E + j scores q₁·c_i + q₂·d_j, for the halves q₁, q₂ of a query and two lists of √E
    keys. The k best are among the sums of the k best of either half, so all E are searched at a cost of O(√E + k²)
    sums a row, exactly.

    Of equal scores the expert of the lowest index goes first (of two that only rounding makes equal, one of them).
    Everything is computed in the dtype of ``keys``, under autocast too.

    Args:
        in_features: of x.
        experts: E, a perfect square.
        k: how many experts each head chooses.
        heads: queries of a row. They share the keys, as in PEER; an expert that several choose counts as often.
        key_features: width of a key, half that of a query.
        batch_norm: whether queries go through batch normalisation, as in both papers, which spreads the choice over
            more experts.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: a size that is no positive int, E that is no perfect square, k > E, a dtype that is not
            floating.
    """

    def __init__(
        self,
        in_features: int,
        experts: int,
        k: int,
        *,
        heads: int = 1,
        key_features: int = 64,
        batch_norm: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype}, expected one of {', '.join(map(str, DTYPES))}")
        self.in_features, self.experts = check_count("in_features", in_features), check_count("experts", experts)
        self.k, self.heads = check_count("k", k, most=self.experts), check_count("heads", heads)
        self.key_features = check_count("key_features", key_features)
        side = math.isqrt(self.experts)
        if side * side != self.experts:
            raise ValueError(f"experts: got {experts}, expected a perfect square, as {side**2} or {(side + 1) ** 2}")
        width = 2 * self.heads * self.key_features
        self.query = nn.Linear(self.in_features, width, device=device, dtype=dtype)
        self.norm = nn.BatchNorm1d(width, device=device, dtype=dtype) if batch_norm else None
        self.keys = nn.Parameter(torch.empty(2, side, self.key_features, device=device, dtype=dtype))
        self._reset_keys()

    def reset_parameters(self) -> None:
        """Draw query and keys anew: what is called after ``to_empty``."""
        self.query.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()
        self._reset_keys()

    def _reset_keys(self) -> None:
        nn.init.uniform_(self.keys, -(self.key_features**-0.5), self.key_features**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and weights ``[..., heads·k]``, head after head, best first, for x ``[..., in_features]``. Weights
        are the softmax over the k scores of a head: differentiable to x, query and keys."""
        indices, scores = self.search(x)
        return indices.flatten(-2), scores.softmax(-1).flatten(-2)

    def search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and scores ``[..., heads, k]`` of the best of each head, best first."""
        halves = self.key_scores(x)
        side = self.keys.shape[1]
        # in the order of their indices, so that of equal sums the lowest expert goes first
        near = top_experts(halves, min(self.k, side)).sort(dim=-1).values
        first, second = halves.gather(-1, near)
        sums = (first[..., :, None] + second[..., None, :]).flatten(-2)
        experts = (near[0][..., :, None] * side + near[1][..., None, :]).flatten(-2)
        best = top_experts(sums, self.k)
        return experts.gather(-1, best), sums.gather(-1, best)

    def key_scores(self, x: Tensor) -> Tensor:
        """The products of the halves of each query with all keys, ``[2, ..., heads, √E]``: expert i·√E + j scores the
        sum of [0, ..., i] and [1, ..., j]."""
        check_rows(x, self.in_features)
        with without_autocast(x):
            query = F.linear(x.to(self.keys.dtype), self.query.weight, self.query.bias)
            if self.norm is not None:
                query = self.norm(query.reshape(-1, query.shape[-1])).reshape(query.shape)
            halves = query.reshape(-1, 2, self.key_features).transpose(0, 1)
            return (halves @ self.keys.mT).reshape(2, *x.shape[:-1], self.heads, self.keys.shape[1])

    def extra_repr(self) -> str:
        return f"experts={self.experts}, k={self.k}, heads={self.heads}, key_features={self.key_features}"


def check_scoring(scoring: Any, experts: int, k: int) -> None:
    """Raise unless ``scoring`` is None or can be called, and, of product keys, is made for this pool and this k."""
    if scoring is not None and not callable(scoring):
        raise TypeError(f"scoring: got {type(scoring).__name__}, expected a module or function of x, or None")
    if isinstance(scoring, ProductKeyScores) and (scoring.experts, scoring.heads * scoring.k) != (experts, k):
        got = f"{scoring.experts} experts, {scoring.heads}·{scoring.k} a row"
        raise ValueError(f"scoring: got product keys of {got}, expected of {experts}, {k} a row")
