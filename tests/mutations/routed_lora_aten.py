"""Mutants of the primitives of routed LoRA on ATen."""

from .mutant import NUMBERS, mutants_of

_FILE = "clora_kernels/kernels/routed_lora/aten.py"

ATEN = mutants_of(
    _FILE,
    "aten",
    NUMBERS,
    [
        (
            "base-accumulated-after-rounding",
            "the adapter is rounded away: the frozen product is rounded, then added",
            "        y.addmm_(*products[0])\n",
            "        y = y + products[0][0] @ products[0][1]\n",
        ),
        (
            "bias-laid-down-first",
            "in 16 bit the bias swallows a small adapter",
            "    y = _lay_down(low_rank)\n",
            "    y = _lay_down(low_rank)\n    if bias is not None:\n        y, bias = y.add_(bias), None\n",
        ),
        (
            "bias-dropped",
            "y without the bias in 16 bit",
            "        y.addmm_(*products[0])\n    return y if bias is None else y.add_(bias)",
            "        y.addmm_(*products[0])\n    return y",
        ),
        (
            "bias-dropped-in-fp32",
            "y without the bias in fp32",
            "y = matmul(a, b, None if bias is None else cast(bias, a.dtype))",
            "y = matmul(a, b)",
        ),
        (
            "group-dx-rounded-between",
            "dx of a group is rounded after each layer",
            "        _accumulate_several(y, products)\n",
            "        for a, b in products:\n            y.addmm_(a, b)\n",
        ),
        (
            "group-dx-of-the-first",
            "in fp32 dx of a group has the frozen product of its first layer alone",
            "[(a, b, None) for a, b in others] + low_rank",
            "low_rank",
        ),
        (
            "16-bit-low-rank-last",
            "the adapter is added onto the rounded frozen product in 16 bit too",
            "if products and not _is_16_bit(products[0][0].dtype):",
            "if products:",
        ),
        (
            "group-dx-columns-lost",
            "dx of a group lacks a column between blocks",
            "columns = slice(start, start + width)",
            "columns = slice(start, start + width - 1)",
        ),
        (
            "group-dx-joined-in-another-order",
            "weights of a group are joined in another order than their gradients",
            "torch.cat([b[:, columns] for _, b in products])",
            "torch.cat([b[:, columns] for _, b in products[::-1]])",
        ),
        (
            "low-rank-of-one-layer",
            "with dropout dx of a group has the adapter of its first layer alone",
            "total = part if total is None else total.add_(part)",
            "total = part if total is None else total",
        ),
        (
            "low-rank-mask-skipped",
            "the adapter's part of dx is not masked",
            "y[block].add_(part if d is None else part.mul_(_kept(block, y.shape[1], d)))",
            "y[block].add_(part)",
        ),
        (
            "low-rank-mask-skipped-in-fp32",
            "the adapter's part of dx is not masked in fp32",
            "y[block].add_(part if d is None else part.mul_(_kept(block, y.shape[1], d)))",
            "y[block].add_(part)",
        ),
        (
            "low-rank-block-overwritten-in-fp32",
            "with dropout the adapter's part of dx takes the place of the frozen product in fp32",
            "y[block].add_(part if d is None else part.mul_(",
            "y[block].copy_(part if d is None else part.mul_(",
        ),
        (
            "low-rank-mask-inverted",
            "the adapter's part of dx is masked where x was kept",
            "part = part if d is None else part.mul_(_kept(block, C.shape[1], d))",
            "part = part if d is None else part.mul_(1 - _kept(block, C.shape[1], d))",
        ),
        (
            "mask-of-the-first-block",
            "every block of rows takes the mask of the first",
            "dropout.threshold, block.start, block.stop - block.start, columns)",
            "dropout.threshold, 0, block.stop - block.start, columns)",
        ),
        (
            "mask-of-the-next-row",
            "the mask is shifted by a row in x and dx alike",
            "dropout.threshold, block.start, block.stop - block.start, columns)",
            "dropout.threshold, block.start + 1, block.stop - block.start, columns)",
        ),
        (
            "mask-inverted",
            "what should be kept is dropped",
            "kept = _kept(block, big.shape[1], dropout)",
            "kept = 1 - _kept(block, big.shape[1], dropout)",
        ),
        (
            "delta-rounded-before-an-fp32-base",
            "the adapter is rounded to 16 bit before it is added onto an fp32 base output",
            "return matmul(cast(a, acc), cast(b, acc))",
            "return cast(matmul(a, b), acc)",
        ),
        (
            "shrink-rounded",
            "p and h are rounded to 16 bit",
            "o[block] = _matmul_unrounded(rows, t.to(rows.dtype).mT)",
            "o[block] = _matmul_unrounded(rows, t.to(rows.dtype).mT).to(big.dtype)",
        ),
        (
            "reduce-rounded",
            "each block's part of dA and U is rounded to 16 bit",
            "part = _matmul_unrounded(t[block].to(rows.dtype).mT, rows)",
            "part = _matmul_unrounded(t[block].to(rows.dtype).mT, rows).to(big.dtype)",
        ),
        (
            "last-rows-lost",
            "the last block of rows is left out",
            "for start in range(0, M, rows):",
            "for start in range(0, max(M - rows, 1), rows):",
        ),
        (
            "rows-lost-between-blocks",
            "each block of rows ends one row early",
            "yield slice(start, min(start + rows, M))",
            "yield slice(start, min(start + rows - 1, M))",
        ),
        (
            "shrink-one-mask-for-all",
            "the layers of a group share a mask of x",
            "_factor(big, block, d)\n            o[block]",
            "_factor(big, block, dropout[0])\n            o[block]",
        ),
        (
            "shrink-mask-skipped",
            "x is not masked",
            "_factor(big, block, d)\n            o[block]",
            "_factor(big, block)\n            o[block]",
        ),
        (
            "shrink-in-another-order",
            "p of one layer of a group is that of another",
            "_matmul_unrounded(big, _stacked(small).mT)",
            "_matmul_unrounded(big, _stacked(small[::-1]).mT)",
        ),
        (
            "reduce-of-the-last-block",
            "dA and U of the last block of rows alone",
            "out[i] += part",
            "out[i] = part",
        ),
        (
            "reduce-mask-skipped",
            "dA of the x that is not masked",
            "_factor(big, block, d)\n            part = _matmul_unrounded(t[block]",
            "_factor(big, block)\n            part = _matmul_unrounded(t[block]",
        ),
        (
            "reduce-one-mask-for-all",
            "the layers of a group share a mask in dA",
            "_factor(big, block, d)\n            part = _matmul_unrounded(t[block]",
            "_factor(big, block, dropout[0])\n            part = _matmul_unrounded(t[block]",
        ),
        (
            "reduce-not-cleared",
            "dA and U of no rows are what the memory held",
            "return out or [big.new_zeros(r, big.shape[1], dtype=acc) for r in ranks]",
            "return out or [big.new_empty(r, big.shape[1], dtype=acc) for r in ranks]",
        ),
        (
            "reduce-without-the-first-block",
            "dA and U lack the first block of rows",
            "out.append(part)",
            "out.append(part * 0)",
        ),
        (
            "reduce-adds-to-another-layer",
            "later blocks of every layer of a group are added to the first",
            "out[i] += part",
            "out[0] += part",
        ),
        (
            "outputs-share-memory",
            "the outputs of one operator are views of one tensor",
            "[part.clone(memory_format=torch.contiguous_format) for part in t.split(ranks, dim)]",
            "list(t.split(ranks, dim))",
        ),
        (
            "base-output-rounded",
            "an fp32 base output is rounded to the dtype of x",
            "+ base_output[block]",
            "+ base_output[block].to(q.dtype)",
        ),
        (
            "delta-rounded-before-the-base",
            "the adapter is rounded before it is added onto a base output of its dtype",
            "y = torch.addmm(base_output, q, C)",
            "y = base_output + q @ C",
        ),
        (
            "base-output-overwritten",
            "the adapter is added in place, onto the caller's base output",
            "y = torch.addmm(base_output, q, C)",
            "y = base_output.addmm_(q, C)",
        ),
    ],
) + mutants_of(
    _FILE,
    "aten-cuda",
    NUMBERS,
    [
        (
            "sums-rounded",
            "p, h, dA and U are rounded to 16 bit by the matmul",
            "return torch.mm(a, b, out_dtype=acc)",
            "return torch.mm(a, b).to(acc)",
        ),
    ],
    gpu=True,
)
