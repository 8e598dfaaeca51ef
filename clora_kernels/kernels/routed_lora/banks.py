"""A bank of routings acts on the [M, r] side, sample by sample; these small products are the same for every backend."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SCRATCH_BYTES = 64 << 20


def _sample_blocks(samples: int, r: int) -> Iterator[slice]:
    """Blocks of samples whose r×r matrices take ``SCRATCH_BYTES`` of fp32 at most; usually one."""
    size = max(SCRATCH_BYTES // (4 * r * r), 1)
    for start in range(0, samples, size):
        yield slice(start, start + size)


def per_sample(t: Tensor, R: Tensor, index: Tensor) -> Tensor:
    """t [M, r] times R[index], one [r, r] a sample."""
    S, r = index.shape[0], t.shape[1]
    samples = t.reshape(S, t.shape[0] // max(S, 1), r)
    blocks = [samples[b] @ R.index_select(0, index[b]) for b in _sample_blocks(S, r)]
    return (torch.cat(blocks) if len(blocks) != 1 else blocks[0]).reshape(t.shape) if blocks else t


def routing_gradients(q: Tensor, h_prime: Tensor, index: Tensor, T: int) -> Tensor:
    """Σ q_mᵀ·h′_m over the samples of each of T routings, [T, r, r]. A one-hot matmul: unlike index_add_ it sums in a
    fixed order."""
    S, r = index.shape[0], q.shape[1]
    q, h_prime = q.reshape(S, q.shape[0] // max(S, 1), r), h_prime.reshape(S, q.shape[0] // max(S, 1), r)
    one_hot = (torch.arange(T, device=q.device)[:, None] == index).to(q.dtype)
    dR = q.new_zeros(T, r * r)
    for b in _sample_blocks(S, r):
        dR.addmm_(one_hot[:, b], (q[b].mT @ h_prime[b]).reshape(-1, r * r))
    return dR.reshape(T, r, r)
