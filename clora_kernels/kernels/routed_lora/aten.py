"""The primitives of routed LoRA on ATen matmuls: every device, no compiler.

In 16 bit the low-rank term is laid down first and the large product accumulates on it inside the matmul (fp32 sums, one
rounding): added to an output that is already rounded, a small adapter would be lost. The bias comes last. In fp32 and
fp64 every partial sum has the accumulation dtype whatever the order, so the large product goes first: the bias is then
part of it, and libraries that cannot accumulate can compute it.
Sums that must come back unrounded (p, h, dA, U) use an fp32 output where the device's matmul has one (CUDA), else
blocks of rows converted to fp32; blocks also bound the scratch of dropout. Scratch: ``SCRATCH_BYTES`` of converted or
masked rows, and one masked copy of the low-rank part of dx at most.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...reference.routed_lora import accumulation_dtype
from ..cpu_matmul import goes_faster_in_blocks, matmul
from ..dropout_mask import dropout_mask
from ..views import cast
from . import compiled
from .algebra import Dropout, Needs, Packed, Projection, Term, apply_gate, total_routing

# On a CPU a block should stay in the caches and yet be worth a call: shrink and reduce of 1576×768, rank 16, bf16, take
# 0.57 and 0.74 ms with 1 MiB, 0.38 and 0.39 with 2, 0.34 and 0.36 with 4. On a GPU a block is large enough to fill it.
SCRATCH_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}


def _is_16_bit(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _row_blocks(big: Tensor) -> Iterator[slice]:
    """Blocks of rows of ``big`` [M, columns] that fill the scratch in fp32."""
    M, columns = big.shape
    rows = max(SCRATCH_BYTES.get(big.device.type, SCRATCH_BYTES["cuda"]) // (4 * max(columns, 1)), 64)
    for start in range(0, M, rows):
        yield slice(start, min(start + rows, M))


def _kept(block: slice, columns: int, dropout: Dropout) -> Tensor:
    """1 where kept, else 0, as bytes: torch multiplies by them three times as fast as by bools."""
    mask = dropout_mask(dropout.seed, dropout.threshold, block.start, block.stop - block.start, columns)
    return mask.view(torch.uint8)


def _factor(big: Tensor, block: slice, dropout: Dropout | None = None) -> Tensor:
    """Rows of ``big``, dropped, in the dtype in which a matmul returns its sums unrounded."""
    rows = big[block] if big.is_cuda else big[block].to(accumulation_dtype(big.dtype))
    if dropout is None:
        return rows
    kept = _kept(block, big.shape[1], dropout)
    return rows * kept if rows.dtype == big.dtype else rows.mul_(kept)


def _matmul_unrounded(a: Tensor, b: Tensor) -> Tensor:
    """a·b with the sums returned as they are accumulated; 16-bit operands on a CPU are converted first."""
    acc = accumulation_dtype(a.dtype)
    if a.dtype != acc and a.is_cuda:
        return torch.mm(a, b, out_dtype=acc)
    return matmul(cast(a, acc), cast(b, acc))


def _in_one_piece(big: Tensor, dropout: list[Dropout | None]) -> bool:
    return not any(dropout) and (big.is_cuda or not _is_16_bit(big.dtype))


def _split(t: Tensor, ranks: list[int], dim: int) -> list[Tensor]:
    """The parts as tensors of their own: outputs of one operator may not share storage."""
    return (
        [t] if len(ranks) == 1 else [part.clone(memory_format=torch.contiguous_format) for part in t.split(ranks, dim)]
    )


def pack(j: Projection, dtype: torch.dtype, A: bool, C: bool, C_live: bool) -> Packed:
    """A, C = s·(R_frozen + R)·B and C_live = s·R·B in ``dtype``, unrounded products; C = s·B with a bank."""
    acc = accumulation_dtype(dtype)
    total = total_routing(j, acc) if C and not j.bank else None
    return Packed(
        cast(j.lora_A, dtype) if A else None,
        _fold(j, total, dtype, acc) if C else None,
        _fold(j, cast(j.routing, acc), dtype, acc) if C_live else None,
    )


def _fold(j: Projection, R: Tensor | None, dtype: torch.dtype, acc: torch.dtype) -> Tensor:
    if R is None and dtype != acc and compiled.folds(j.lora_B, j.scaling):
        return compiled.fold(j.lora_B, j.scaling, j.lora_B.new_empty(0, dtype=dtype))
    B = cast(j.lora_B, acc).mT
    return cast((B if R is None else R @ B) * j.scaling, dtype)


def unpack(j: Projection, U: Tensor, need: Needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dB = s·Rᵀ·U, dR = s·U·Bᵀ and ds = ⟨U, (R_frozen + R)·B⟩ for U [r, N] in the accumulation dtype."""
    acc = U.dtype
    dB = dR = dscaling = None
    if need.lora_B:
        live = None if j.routing is None else cast(j.routing, acc)
        dB = cast((U.mT if live is None else U.mT @ live) * j.scaling, j.lora_B.dtype)
    if need.routing:
        dR = cast((U @ cast(j.lora_B, acc)) * j.scaling, j.routing.dtype)
    if need.scaling:
        total, B = total_routing(j, acc), cast(j.lora_B, acc)
        dscaling = (U.mT * (B if total is None else B @ total.mT)).sum().to(j.scaling)
    return dB, dR, dscaling


def shrink(big: Tensor, terms: list[Term]) -> list[tuple[Tensor | None, Tensor | None]]:
    """For each term, where wanted: (mask ⊙ big)·smallᵀ [M, r], unrounded, and that gated in big.dtype."""
    if all(map(_is_rounded_once, terms)) and not compiled.is_faster(big):
        rounded = matmul(big, _stacked([t.small for t in terms]).mT)
        return [(None, part) for part in _split(rounded, [t.small.shape[0] for t in terms], 1)]
    sums = _sums(big, [t.small for t in terms], [t.dropout if t.masked else None for t in terms])
    return [
        (p if t.want_sum else None, cast(apply_gate(p, t.dropout, t.gate), big.dtype) if t.want_gated else None)
        for t, p in zip(terms, sums, strict=True)
    ]


def _is_rounded_once(term: Term) -> bool:
    """Whether a matmul gives what is wanted: the sum itself is not, and nothing acts on it before it is rounded."""
    return not term.want_sum and term.gate is None and term.dropout is None


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sums(big: Tensor, small: list[Tensor], dropout: list[Dropout | None]) -> list[Tensor]:
    """mask_j ⊙ big [M, K] times small_jᵀ ([r_j, K]) → [M, r_j] in the accumulation dtype; big is read once."""
    ranks = [t.shape[0] for t in small]
    if _in_one_piece(big, dropout):
        return _split(_matmul_unrounded(big, _stacked(small).mT), ranks, 1)
    if compiled.serves(big):
        return [compiled.shrink(big, t, d) for t, d in zip(small, dropout, strict=True)]
    acc = accumulation_dtype(big.dtype)
    out = [big.new_empty(big.shape[0], r, dtype=acc) for r in ranks]
    for block in _row_blocks(big):
        shared = None if all(dropout) else _factor(big, block)
        for t, d, o in zip(small, dropout, out, strict=True):
            rows = shared if d is None else _factor(big, block, d)
            o[block] = _matmul_unrounded(rows, t.to(rows.dtype).mT)
            del rows  # or two blocks are alive while the next is made
        del shared
    return out


def reduce(small: list[Tensor], big: Tensor, dropout: list[Dropout | None]) -> list[Tensor]:
    """small_jᵀ ([M, r_j]) times mask_j ⊙ big [M, K] → [r_j, K] in the accumulation dtype; big is read once."""
    ranks = [t.shape[1] for t in small]
    if _in_one_piece(big, dropout):
        return _split(_matmul_unrounded((torch.cat(small, 1) if len(small) > 1 else small[0]).mT, big), ranks, 0)
    if compiled.serves(big):
        return [compiled.reduce(t, big, d) for t, d in zip(small, dropout, strict=True)]
    acc = accumulation_dtype(big.dtype)
    out: list[Tensor] = []
    for block in _row_blocks(big):
        shared = None if all(dropout) else _factor(big, block)
        for i, (t, d) in enumerate(zip(small, dropout, strict=True)):
            rows = shared if d is None else _factor(big, block, d)
            part = _matmul_unrounded(t[block].to(rows.dtype).mT, rows)
            if block.start:
                out[i] += part
            else:
                out.append(part)
            del rows
        del shared
    return out or [big.new_zeros(r, big.shape[1], dtype=acc) for r in ranks]


def linear(
    products: list[tuple[Tensor, Tensor]],
    low_rank: list[tuple[Tensor, Tensor, Dropout | None]],
    bias: Tensor | None = None,
    base_output: Tensor | None = None,
) -> Tensor:
    """Σ a_i·b_i + Σ mask_j ⊙ (q_j·C_j) + bias + base_output [M, N], in base_output's dtype or that of the operands."""
    if base_output is not None:
        return _onto_base(base_output, low_rank, bias)
    if products and not _is_16_bit(products[0][0].dtype):
        return _low_rank_last(products, low_rank, bias)
    alpha = _share_laid_down(low_rank[0][0]) if products else 1.0
    y = _lay_down(low_rank, alpha)
    if len(products) > 1:
        _accumulate_several(y, products, 1 / alpha)
    elif products:
        y.addmm_(*products[0], beta=1 / alpha)
    return y if bias is None else y.add_(bias)


def _low_rank_last(
    products: list[tuple[Tensor, Tensor]], low_rank: list[tuple[Tensor, Tensor, Dropout | None]], bias: Tensor | None
) -> Tensor:
    (a, b), *others = products
    y = matmul(a, b, None if bias is None else cast(bias, a.dtype))
    for a, b, d in [(a, b, None) for a, b in others] + low_rank:
        if d is None and not goes_faster_in_blocks(a, b):
            y.addmm_(a, b)
        elif d is not None and compiled.serves(y):
            compiled.expand(y, a, b, d, accumulate=True)
        else:
            for block in _row_blocks(y):
                part = matmul(a[block], b)
                y[block].add_(part if d is None else part.mul_(_kept(block, y.shape[1], d)))
                del part
    return y


def _share_laid_down(q: Tensor) -> float:
    """What of the low-rank term is laid down for the large product to accumulate on, as beta = 1/share.

    Half on CUDA: cuBLAS's bf16 matmuls of many rows and even sizes round the product for beta = 1 before they add
    (H200, CUDA 13.0: of an adapter of 1e-3 of y 0.53 came through), and add in fp32 for beta = 2 (1.000; from 11 %
    faster to 14 % slower over 11 shapes, 2 % in the median). Halving is exact but for fp16 numbers below 2⁻¹³, which it
    may move by 2⁻²⁵, and overflows nothing.
    """
    return 0.5 if q.is_cuda else 1.0


def _lay_down(low_rank: list[tuple[Tensor, Tensor, Dropout | None]], alpha: float) -> Tensor:
    """alpha·Σ mask_j ⊙ (q_j·C_j), rounded once."""
    q, C, d = low_rank[0]
    if not any(d for _, _, d in low_rank):
        if len(low_rank) > 1:
            q, C = torch.cat([q for q, _, _ in low_rank], 1), torch.cat([C for _, C, _ in low_rank])
        if alpha != 1:
            return q.new_empty(q.shape[0], C.shape[1]).addmm_(q, C, beta=0, alpha=alpha)
        return compiled.expand(q.new_empty(q.shape[0], C.shape[1]), q, C, None) if compiled.is_faster(q) else q @ C
    y = q.new_empty(q.shape[0], C.shape[1])
    if len(low_rank) == 1 and compiled.serves(q):
        return compiled.expand(y, q, C, d)
    for block in _row_blocks(y):
        total = _masked_sum(low_rank, block)
        y[block] = total if alpha == 1 else total.mul_(alpha)
    return y


def _masked_sum(low_rank: list[tuple[Tensor, Tensor, Dropout | None]], block: slice) -> Tensor:
    """Rows of Σ mask_j ⊙ (q_j·C_j) in the accumulation dtype."""
    total: Tensor | None = None
    for q, C, d in low_rank:
        if compiled.serves(q):
            first = total is None
            total = q.new_empty(block.stop - block.start, C.shape[1], dtype=torch.float32) if total is None else total
            compiled.expand(total, q[block], C, d, block.start, accumulate=not first)
            continue
        part = _matmul_unrounded(q[block], C)
        part = part if d is None else part.mul_(_kept(block, C.shape[1], d))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _accumulate_several(y: Tensor, products: list[tuple[Tensor, Tensor]], beta: float) -> None:
    """y = beta·y + Σ a_i·b_i with one rounding: one matmul over the joined inner dimension, by blocks of columns to
    bound the copy."""
    a = torch.cat([a for a, _ in products], 1)
    width = max(SCRATCH_BYTES["cuda"] // (a.element_size() * max(a.shape[1], 1)), 64)
    for start in range(0, y.shape[1], width):
        columns = slice(start, start + width)
        y[:, columns].addmm_(a, torch.cat([b[:, columns] for _, b in products]), beta=beta)


def _onto_base(
    base_output: Tensor, low_rank: list[tuple[Tensor, Tensor, Dropout | None]], bias: Tensor | None
) -> Tensor:
    ((q, C, _),) = low_rank
    if base_output.dtype == q.dtype:
        y = torch.addmm(base_output, q, C)
        return y if bias is None else y.add_(bias)
    y = torch.empty(base_output.shape, dtype=base_output.dtype, device=base_output.device)
    for block in _row_blocks(y):
        total = _matmul_unrounded(q[block], C) + base_output[block]
        y[block] = total if bias is None else total.add_(bias)
    return y
