"""Mutants of shrink and reduce in Triton."""

from .mutant import Mutant, mutants_of

_FOLDER = "clora_kernels/kernels/routed_lora/triton"
_TESTS = ("tests/test_routed_lora_triton_primitives.py",)
_COMPILED = ("tests/test_routed_lora_triton_forms.py",)

TRITON_BIG: list[Mutant] = []
TRITON_BIG += mutants_of(
    f"{_FOLDER}/shrink.py",
    "triton-shrink",
    _TESTS,
    [
        ("gate-skipped", "the gate is left out", "        if gate_ptr is not None:\n", "        if False:\n"),
        ("gate-transposed", "the gate with its strides swapped",
         "load_tile(gate_ptr, stride_gm, stride_gr,", "load_tile(gate_ptr, stride_gr, stride_gm,"),
        ("kept-value-skipped", "the kept value is left out", "        if threshold_ptr is not None:\n", "        if False:\n"),
        ("sum-gated", "the sum is stored where the gated one goes",
         "store_tile(gated_ptr, rank, 1,", "store_tile(sum_ptr, rank, 1,"),
        ("ranks-beyond", "ranks of the padding are stored", "    mask_r = offs_r < rank\n", "    mask_r = offs_r < rank + 1\n"),
        ("mask-skipped", "nothing drops",
         "left = tl.where(keep, big, tl.zeros_like(big))", "left = big"),
        ("mask-inverted", "what is kept drops", "tl.where(keep, big, tl.zeros_like(big))", "tl.where(keep, tl.zeros_like(big), big)"),
        ("first-seed", "every term drops by the first seed that is read", "kept(seeds[j], thresholds[j],", "kept(seeds[TERMS - 1], thresholds[j],"),
        ("first-threshold", "every term drops by the last threshold", "kept(seeds[j], thresholds[j],", "kept(seeds[j], thresholds[TERMS - 1],"),
        ("lanes-of-first-columns", "every block drops like the first", "offs_m, k, K, BLOCK_M, BLOCK_K)", "offs_m, 0, K, BLOCK_M, BLOCK_K)"),
        ("groups-of-a-block", "rows of the mask are as wide as a block", "offs_m, k, K, BLOCK_M, BLOCK_K)", "offs_m, k, BLOCK_K, BLOCK_M, BLOCK_K)"),
        ("big-transposed", "big with its strides swapped", "load_tile(big_ptr, stride_bm, stride_bk,", "load_tile(big_ptr, stride_bk, stride_bm,"),
        ("small-of-first", "every term multiplies the first small operand", "load_tile(small_ptrs[j],", "load_tile(small_ptrs[0],"),
        ("columns-beyond", "columns beyond K are read", "mask_k = offs_k < K\n", "mask_k = offs_k < K + 1\n"),
        ("rows-beyond", "rows beyond M are read",
         "offs_r = tl.arange(0, BLOCK_R)\n    mask_m = offs_m < M\n    first", "offs_r = tl.arange(0, BLOCK_R)\n    mask_m = offs_m < M + 1\n    first"),
        ("steps-forgotten", "a sum starts anew at every step", "dot(left, small, accs[j], PRECISION)", "dot(left, small, accs[j] * 0, PRECISION)"),
        ("part-without-end", "a part runs to the end of K", "tl.minimum(first + steps * BLOCK_K, K)", "K"),
        ("parts-overlap", "every part begins where the first does", "first = tl.program_id(1) * steps * BLOCK_K", "first = 0 * steps * BLOCK_K"),
        ("one-place-of-terms", "the parts of all terms go to one place", "(tl.program_id(1) * TERMS + j)", "(tl.program_id(1) * TERMS)"),
        ("last-part-lost", "the last part is lost", "for _ in range(splits):", "for _ in range(splits - 1):"),
        ("part-again", "the first part is added again and again", "            part += size * TERMS\n", ""),
        ("parts-backwards", "the parts are added from the last on",
         "        part = parts_ptr + size * j\n", "        part = parts_ptr + size * j\n        part += size * TERMS * (splits - 1)\n        TERMS = -TERMS\n"),
        ("part-of-first-term", "the sums of every term are those of the first", "part = parts_ptr + size * j", "part = parts_ptr"),
        ("last-rows-lost", "the last rows of a split sum are lost", "shrink_sums_kernel[(triton.cdiv(M, 16),)]", "shrink_sums_kernel[(max(M // 16, 1),)]"),
        ("masked-unasked", "a mask acts where the term says it does not", "t.dropout if t.masked else None", "t.dropout"),
        ("results-of-a-chunk", "only the last chunk is returned", "found += outputs", "found = outputs"),
        ("gated-in-fp32", "what is gated stays in fp32", "torch.empty((M, r), dtype=big.dtype", "torch.empty((M, r), dtype=torch.float32"),
    ],
)  # fmt: skip
TRITON_BIG += mutants_of(
    f"{_FOLDER}/reduce.py",
    "triton-reduce",
    _TESTS,
    [
        ("mask-skipped", "nothing drops", "left = tl.where(keep.T, big, tl.zeros_like(big))", "left = big"),
        ("mask-transposed", "the mask transposed", "tl.where(keep.T, big,", "tl.where(keep, big,"),
        ("mask-inverted", "what is kept drops", "tl.where(keep.T, big, tl.zeros_like(big))", "tl.where(keep.T, tl.zeros_like(big), big)"),
        ("last-seed", "every term drops by the last seed", "kept(seeds[j],", "kept(seeds[TERMS - 1],"),
        ("last-threshold", "every term drops by the last threshold", "thresholds[j], offs_m", "thresholds[TERMS - 1], offs_m"),
        ("lanes-of-first-columns", "every block drops like the first", "offs_m, pid_k * BLOCK_K, K,", "offs_m, 0, K,"),
        ("rows-of-first-block", "every block of rows drops like the first",
         "kept(seeds[j], thresholds[j], offs_m,", "kept(seeds[j], thresholds[j], offs_m - m,"),
        ("big-transposed", "big with its strides swapped", "load_tile(big_ptr, stride_bk, stride_bm,", "load_tile(big_ptr, stride_bm, stride_bk,"),
        ("small-of-first", "every term multiplies the first small operand", "load_tile(small_ptrs[j],", "load_tile(small_ptrs[0],"),
        ("small-strides-of-first", "small operands by the strides of the first", "strides_sm[j], strides_sr[j]", "strides_sm[0], strides_sr[0]"),
        ("rows-beyond", "rows beyond M are read", "mask_m = offs_m < M\n", "mask_m = offs_m < M + 1\n"),
        ("columns-beyond", "columns beyond K are read", "mask_k = offs_k < K\n", "mask_k = offs_k < K + 1\n"),
        ("ranks-beyond", "ranks beyond r are read", "mask_m, offs_r < ranks[j])", "mask_m, offs_r < ranks[j] + 1)"),
        ("ranks-beyond-stored", "ranks beyond r are written", "offs_k, offs_r < ranks[j], mask_k", "offs_k, offs_r < ranks[j] + 1, mask_k"),
        ("untransposed", "the sums are stored as they stand", "mask_k, accs[j].T)", "mask_k, tl.reshape(accs[j], (BLOCK_R, BLOCK_K)))"),
        ("steps-forgotten", "a sum starts anew at every step", "dot(left, small, accs[j], PRECISION)", "dot(left, small, accs[j] * 0, PRECISION)"),
        ("part-without-end", "a part runs to the end of M", "tl.minimum(first + steps * BLOCK_M, M)", "M"),
        ("parts-overlap", "every part begins where the first does", "first = tl.program_id(1).to(tl.int64) * steps", "first = tl.program_id(1).to(tl.int64) * 0"),
        ("one-place-of-parts", "all parts go to one place", "part_ptrs[j] + tl.program_id(1).to(tl.int64) * ranks[j] * K", "part_ptrs[j]"),
        ("last-part-lost", "the last part is lost", "for _ in range(splits):", "for _ in range(splits - 1):"),
        ("part-again", "the first part is added again and again", "        parts_ptr += size\n", ""),
        ("parts-backwards", "the parts are added from the last on", "tl.load(parts_ptr + offs,", "tl.load(parts_ptr + (splits - 1 - 2 * _) * size + offs,"),
        ("sum-beyond", "sums beyond the end are written", "tl.store(out_ptr + offs, acc, mask=offs < size)", "tl.store(out_ptr + offs, acc, mask=offs < size + 1)"),
        ("sums-of-one-block", "a split sum of more than a block is not finished", "triton.cdiv(total.numel(), 1024),", "1,"),
    ],
)  # fmt: skip
for _name in ("shrink", "reduce"):
    TRITON_BIG += mutants_of(
        f"{_FOLDER}/{_name}.py",
        f"triton-{_name}",
        _COMPILED,
        [
            ("tf32", "fp32 is rounded to tf32", "accs[j], PRECISION)", 'accs[j], "tf32")'),
            ("M-compiled-in", "another M is another compilation",
             f'@triton.jit(do_not_specialize=["M"])\ndef {_name}_kernel', f"@triton.jit\ndef {_name}_kernel"),
        ],
    )  # fmt: skip
