"""From what a scoring says of rows or samples to the experts that they use and the weights of those."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...autograd.rank1_experts.arguments import check_gates, check_index_tensor
from ...dispatch.indices import bounded, check_range
from ...reference.routed_lora import accumulation_dtype
from .arguments import check_count

SELECTIONS = ("sample", "token", "batch")
WEIGHTS = ("probability", "unit")


class Chosen(NamedTuple):
    """``indices`` and ``gates`` as :func:`clora_kernels.rank1_experts` takes them."""

    indices: Tensor
    gates: Tensor | None

    def to(self, device: torch.device) -> Chosen:
        return Chosen(self.indices.to(device), None if self.gates is None else self.gates.to(device))


def top_experts(scores: Tensor, k: int) -> Tensor:
    """The positions of the k largest of the last dimension, largest first and, of equal ones, the lowest first; on any
    device the same. int64, without a gradient."""
    scores = scores.detach()
    if scores.dtype == torch.float64 or not scores.is_floating_point():
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # topk promises nothing of equal values, and a sort takes several times as long. So topk of integers: above, the
    # sign and magnitude of a score, which order them as scores (both zeros are one); below, the position from the end.
    bits = scores.float().view(torch.int32)
    sign = bits >> 31
    ordered = (bits & 0x7FFFFFFF).bitwise_xor_(sign).sub_(sign)
    last = scores.shape[-1] - 1
    keys = ordered.long().mul_(1 << 32).add_(torch.arange(last, -1, -1, device=scores.device))
    return last - (keys.topk(k).values & 0xFFFFFFFF)


def first_tokens(x: Tensor) -> Tensor:
    """The first token of each sample, [S, K] of x [S, ..., K]; x itself where it has no tokens."""
    while x.dim() > 2:
        x = x[:, 0]
    return x


def activations(indices: Tensor, experts: int) -> Tensor:
    """How often each expert of a pool stands in ``indices``: [experts] int64."""
    positions = bounded(indices, experts).reshape(-1).long()
    return positions.new_zeros(experts).scatter_add_(0, positions, torch.ones_like(positions))


def runs_again() -> bool:
    """Whether activation checkpointing runs forward a second time, for backward: what this forward would count stands
    already. A compiled forward runs for itself."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def choose_experts(found: Any, x: Tensor, experts: int, k: int, selection: str, weights: str) -> Chosen:
    """The choice for x from what its scoring returned: scores, or indices with their weights.

    Raises:
        TypeError, ValueError: what was returned is neither, or does not fit x, ``experts`` and k; says how.
        IndexError: indices outside the pool, where :func:`clora_kernels.rank1_experts` raises it.
    """
    if isinstance(found, Tensor):
        scores = _selected(found, "scores", x, experts, selection)
        if not scores.is_floating_point():
            raise TypeError(f"scoring: got scores in {scores.dtype} from it, expected floating ones")
        indices = top_experts(scores, k)
        if selection == "batch":
            indices = _most_used(indices, experts)
        if weights == "unit":
            return Chosen(indices, None)
        return Chosen(indices, scores.softmax(-1, dtype=accumulation_dtype(scores.dtype)).gather(-1, indices))
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(t, Tensor) for t in found)):
        raise TypeError(f"scoring: got {type(found).__name__} from it, expected scores or (indices, weights)")
    indices, gates = (
        _selected(t, f"{n} of", x, k, selection) for t, n in zip(found, ("indices", "weights"), strict=True)
    )
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"scoring: got indices in {indices.dtype} from it, expected int64 or int32")
    if selection != "batch":
        return Chosen(indices, None if weights == "unit" else gates)
    if weights != "unit":
        raise ValueError(
            "weights: got 'probability' with selection='batch' and a scoring that returns indices, expected 'unit': "
            "a sample has no weight for an expert that only others chose"
        )
    if not torch.compiler.is_compiling():
        check_range("indices", indices, experts)
    return Chosen(_most_used(indices, experts), None)


def _most_used(indices: Tensor, experts: int) -> Tensor:
    """For every sample the same experts, as many as each chose: those that most of them chose."""
    return top_experts(activations(indices, experts), indices.shape[-1]).expand(indices.shape)


def _selected(t: Tensor, what: str, x: Tensor, columns: int, selection: str) -> Tensor:
    """``t``, which a scoring returned, of what chooses: of tokens [..., columns], or of samples [S, columns], for which
    their first tokens stand where there are all."""
    got, per_token, per_sample = tuple(t.shape), (*x.shape[:-1], columns), (*x.shape[:1], columns)
    has_tokens = x.dim() > 2
    if got == per_token:
        return t if selection == "token" else first_tokens(t)
    if has_tokens and selection != "token" and got == per_sample:
        return t
    expected = f"{per_token} = x.shape[:-1] + ({'experts' if what == 'scores' else 'k'},)"
    if has_tokens and selection != "token":
        expected += f", or {per_sample} for samples"
    raise ValueError(f"scoring: got {what} shape {got} from it, expected {expected}")


def fixed_choice(
    counts: Tensor, k: int, top: int | None, indices: Tensor | None = None, gates: Tensor | None = None
) -> Chosen:
    """A choice for every x: the ``top`` (k by default) experts of the highest ``counts`` [experts], or what is given.

    Raises:
        ValueError, TypeError, IndexError: both, gates without indices, or values that do not fit; says how.
    """
    if indices is None:
        if gates is not None:
            raise ValueError("gates: got a tensor without indices, expected the indices that they weight")
        return Chosen(top_experts(counts, check_count("top", k if top is None else top, most=counts.shape[0])), None)
    if top is not None:
        raise ValueError(f"top: got {top!r} with indices, expected one of the two")
    check_index_tensor(indices, counts)
    if indices.dim() != 1:
        raise ValueError(f"indices: got shape {tuple(indices.shape)}, expected (n,): one choice for every x")
    check_gates(gates, indices)
    check_range("indices", indices, counts.shape[0])
    return Chosen(indices.clone(), None if gates is None else gates.detach().clone())
