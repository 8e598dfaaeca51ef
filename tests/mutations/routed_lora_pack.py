"""Mutants of what routed LoRA packs, unpacks and shrinks on ATen."""

from .mutant import NUMBERS, mutants_of

_FILE = "clora_kernels/kernels/routed_lora/aten.py"

PACK = []
PACK += mutants_of(
    _FILE,
    "aten-pack",
    NUMBERS,
    [
        (
            "C-without-frozen",
            "C without the frozen routing",
            "_fold(j, total, dtype, acc) if C else None",
            "_fold(j, None if total is None else cast(j.routing, acc), dtype, acc) if C else None",
        ),
        (
            "C-live-with-frozen",
            "C_live with the frozen routing",
            "_fold(j, cast(j.routing, acc), dtype, acc) if C_live",
            "_fold(j, total_routing(j, acc), dtype, acc) if C_live",
        ),
        (
            "A-unrounded",
            "A keeps the dtype of lora_A",
            "cast(j.lora_A, dtype) if A",
            "j.lora_A if A",
        ),
        (
            "C-unrounded",
            "C keeps the dtype in which it is summed",
            "return cast((B if R is None else R @ B) * j.scaling, dtype)",
            "return (B if R is None else R @ B) * j.scaling",
        ),
        (
            "operand-of-C-rounded",
            "lora_B is rounded before it is routed",
            "B = cast(j.lora_B, acc).mT",
            "B = cast(cast(j.lora_B, dtype), acc).mT",
        ),
        (
            "C-rounded-before-scaling",
            "C is rounded before it is scaled, and again",
            "return cast((B if R is None else R @ B) * j.scaling, dtype)",
            "return cast(cast(B if R is None else R @ B, dtype) * j.scaling, dtype)",
        ),
        (
            "A-unasked",
            "A is packed, asked for or not",
            "cast(j.lora_A, dtype) if A else None",
            "cast(j.lora_A, dtype)",
        ),
        (
            "C-unasked",
            "C is packed, asked for or not",
            "_fold(j, total, dtype, acc) if C else None",
            "_fold(j, total, dtype, acc)",
        ),
        (
            "C-live-unasked",
            "C_live is packed beside a frozen routing, asked for or not",
            "dtype, acc) if C_live else None",
            "dtype, acc) if C_live or j.frozen_routing is not None else None",
        ),
        (
            "scale-skipped-in-C",
            "C is not scaled",
            "return cast((B if R is None else R @ B) * j.scaling, dtype)",
            "return cast(B if R is None else R @ B, dtype)",
        ),
        (
            "R-transposed",
            "C of the transposed routing",
            "else R @ B) * j.scaling",
            "else R.mT @ B) * j.scaling",
        ),
    ],
)
PACK += mutants_of(
    _FILE,
    "aten-unpack",
    NUMBERS,
    [
        (
            "frozen-reaches-dB",
            "dB through the whole routing",
            "live = None if j.routing is None else cast(j.routing, acc)",
            "live = total_routing(j, acc)",
        ),
        (
            "frozen-forgotten-in-dscaling",
            "the gradient of scaling without the frozen routing",
            "total, B = total_routing(j, acc), cast(",
            "total, B = None if j.routing is None else cast(j.routing, acc), cast(",
        ),
        (
            "scale-skipped-in-dB",
            "dB is not scaled",
            "cast((U.mT if live is None else U.mT @ live) * j.scaling,",
            "cast((U.mT if live is None else U.mT @ live),",
        ),
        (
            "scale-skipped-in-dR",
            "dR is not scaled",
            "cast((U @ cast(j.lora_B, acc)) * j.scaling,",
            "cast((U @ cast(j.lora_B, acc)),",
        ),
        (
            "scale-in-dscaling",
            "the gradient of scaling is scaled",
            "(B if total is None else B @ total.mT)).sum()",
            "(B if total is None else B @ total.mT) * j.scaling).sum()",
        ),
        (
            "R-transposed-in-dB",
            "dB through the transposed routing",
            "else U.mT @ live)",
            "else U.mT @ live.mT)",
        ),
        (
            "dR-transposed",
            "dR is transposed",
            "cast((U @ cast(j.lora_B, acc)) * j.scaling",
            "cast((U @ cast(j.lora_B, acc)).mT * j.scaling",
        ),
        (
            "R-transposed-in-dscaling",
            "the gradient of scaling through the transposed routing",
            "B @ total.mT)).sum()",
            "B @ total)).sum()",
        ),
        (
            "dB-unasked",
            "dB is made, wanted or not",
            "    if need.lora_B:\n",
            "    if True:\n",
        ),
        (
            "dR-unasked",
            "dR is made, wanted or not",
            "    if need.routing:\n",
            "    if j.routing is not None:\n",
        ),
        (
            "dscaling-unasked",
            "the gradient of scaling is made, wanted or not",
            "    if need.scaling:\n",
            "    if True:\n",
        ),
        (
            "gradients-exchanged",
            "dB and dR change places",
            "return dB, dR, dscaling",
            "return dR, dB, dscaling",
        ),
        (
            "dtype-of-dB",
            "dB comes in the dtype in which it is summed",
            "dB = cast((U.mT if live is None else U.mT @ live) * j.scaling, j.lora_B.dtype)",
            "dB = (U.mT if live is None else U.mT @ live) * j.scaling",
        ),
        (
            "dtype-of-dR",
            "dR comes in the dtype of lora_B",
            "* j.scaling, j.routing.dtype)",
            "* j.scaling, j.lora_B.dtype)",
        ),
    ],
)
PACK += mutants_of(
    _FILE,
    "aten-shrink",
    NUMBERS,
    [
        (
            "gate-skipped",
            "what shrink gates it does not gate",
            "cast(apply_gate(p, t.dropout, t.gate), big.dtype)",
            "cast(apply_gate(p, t.dropout, None), big.dtype)",
        ),
        (
            "kept-value-skipped",
            "what shrink drops it does not scale up",
            "cast(apply_gate(p, t.dropout, t.gate), big.dtype)",
            "cast(apply_gate(p, None, t.gate), big.dtype)",
        ),
        (
            "gated-unrounded",
            "what is gated comes back unrounded",
            "cast(apply_gate(p, t.dropout, t.gate), big.dtype) if",
            "apply_gate(p, t.dropout, t.gate) if",
        ),
        (
            "gated-sum",
            "the sum comes back gated",
            "(p if t.want_sum else None,",
            "(apply_gate(p, t.dropout, t.gate) if t.want_sum else None,",
        ),
        (
            "sum-unasked",
            "the sum comes back, wanted or not",
            "(p if t.want_sum else None,",
            "(p,",
        ),
        (
            "gated-unasked",
            "what is gated comes back, wanted or not",
            " if t.want_gated else None)",
            ")",
        ),
        (
            "mask-never",
            "no term masks",
            "[t.dropout if t.masked else None for t in terms])",
            "[None for t in terms])",
        ),
        (
            "mask-always",
            "terms that are not masked mask",
            "[t.dropout if t.masked else None for t in terms])",
            "[t.dropout for t in terms])",
        ),
        (
            "sum-rounded-once",
            "where the sum is wanted one matmul is taken for it",
            "return not term.want_sum and term.gate is None",
            "return term.gate is None",
        ),
        (
            "gate-rounded-once",
            "one matmul is taken for what is gated",
            "return not term.want_sum and term.gate is None and",
            "return not term.want_sum and",
        ),
        (
            "dropout-rounded-once",
            "one matmul is taken for what drops",
            "term.gate is None and term.dropout is None",
            "term.gate is None",
        ),
        (
            "rounded-once-for-several",
            "the first of several terms is taken for all",
            "if all(map(_is_rounded_once, terms)) and",
            "if _is_rounded_once(terms[0]) and",
        ),
    ],
)
