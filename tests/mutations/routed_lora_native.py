"""Mutants of the compiled CPU path of routed LoRA: its C++, its wrappers, the rule that takes it."""

from .mutant import mutants_of
from .routed_lora_layer import PLAIN_LAYER

_OPERATORS = ("tests/test_routed_lora_operators.py", "tests/test_routed_lora_operator_errors.py")
_LAYER = ("tests/test_routed_lora_native*.py", "tests/test_report.py")

_BLOCKS = mutants_of(
    "csrc/routed_lora_blocks.h",
    "native",
    _OPERATORS,
    [
        (
            "first-row-ignored",
            "every mask begins at row 0",
            "(mask.first_row + row) * mask.groups_per_row",
            "row * mask.groups_per_row",
        ),
        (
            "mask-of-the-first-block",
            "every block of columns has the mask of the first",
            "mask.groups_per_row + column / kGroup);",
            "mask.groups_per_row);",
        ),
        (
            "mask-tail-lost",
            "the last group of a row is not drawn",
            "(count + kGroup - 1) / kGroup;",
            "count / kGroup;",
        ),
        (
            "columns-taken-for-contiguous",
            "a strided row is read as if it had no gaps",
            "T::from(source[k * big.column_stride]);",
            "T::from(source[k]);",
        ),
        (
            "second-tile-lost",
            "ranks beyond 16 are those of the first tile",
            "(j / kWidth * kRows + i) * kWidth",
            "i * kWidth",
        ),
        ("piece-repeated", "each piece meets the first factors", "factors + k * kWidth, kWidth", "factors, kWidth"),
        ("one-chain", "long sums are one chain of additions", "kLongestChain = 128;", "kLongestChain = 1 << 20;"),
        ("sums-counted-twice", "a sum is not empty after it was moved", "    sums[i] = 0.0f;\n", ""),
        (
            "last-piece-lost",
            "the last rows of reduce do not count",
            "    move_to(total, sums);\n    for (int64_t rank",
            "    for (int64_t rank",
        ),
        ("accumulate-ignored", "y is overwritten", "s.accumulate, width, y.data", "false, width, y.data"),
        (
            "expand-drops-nothing",
            "expand has no mask",
            "        drop(mask, first + i, column, width, sums[i]);\n",
            "",
        ),
        (
            "gaps-between-rows-ignored",
            "y is written as if its rows had no gaps",
            "(first + i) * y.row_stride + column);",
            "(first + i) * y.columns + column);",
        ),
    ],
)

_FEW_ROWS = mutants_of(
    "csrc/routed_lora_few_rows.h",
    "native",
    _OPERATORS,
    [
        (
            "dot-tail-lost",
            "the last columns of a dot product do not count",
            "for (int64_t i = k; i < K; ++i) sum +=",
            "for (int64_t i = K; i < K; ++i) sum +=",
        ),
        (
            "pack-untransposed",
            "rows of any stride are packed as columns",
            "if (small.row_stride == 1) {",
            "if (true) {",
        ),
        ("scale-dropped", "fold does not scale", "scale * source[j];", "source[j];"),
        (
            "product-tail-lost",
            "the last columns of the weight do not count",
            "for (int64_t k = whole; k < width; ++k)",
            "for (int64_t k = width; k < width; ++k)",
        ),
        (
            "product-of-the-first-block",
            "every block of columns reads the first of the weight",
            "weight.row_stride + begin;",
            "weight.row_stride;",
        ),
        (
            "outer-tail-lost",
            "the last columns of an outer product are not written",
            "for (int64_t k = whole; k < columns; ++k) {",
            "for (int64_t k = columns; k < columns; ++k) {",
        ),
        (
            "outer-tail-unscaled",
            "the last columns of an outer product are not scaled",
            "target[k] = factor * sum;",
            "target[k] = sum;",
        ),
        ("outer-unscaled", "an outer product is not scaled", "= factor * low;", "= low;"),
    ],
)

_ROUNDING = mutants_of(
    "csrc/simd.h",
    "native",
    _OPERATORS,
    [
        ("ties-away", "ties round away from zero", "0x7FFFu + (bits >> 16 & 1u)", "0x8000u"),
        ("nan-rounded", "a NaN may round to Inf", "? (bits >> 16 | 0x40u) : rounded", "? rounded : rounded"),
    ],
)

_OPERATOR = mutants_of(
    "csrc/routed_lora.cpp",
    "native",
    _OPERATORS,
    [
        (
            "few-rows-drop-nothing",
            "shrink of few rows has no mask",
            'widened(big, "big", K, mask)',
            'widened(big, "big", K)',
        ),
        (
            "kept-value-forgotten",
            "q counts what is kept once",
            "rounded(p, kept_value(threshold), x)",
            "rounded(p, 1.0f, x)",
        ),
        (
            "waiting-scale-forgotten",
            "in fp32 g is not scaled",
            "waits ? kept * *scale.const_data_ptr<float>() : kept;",
            "kept;",
        ),
        (
            "few-rows-g-unkept",
            "of few rows g counts what is kept once",
            "rounded(product_of(rows, rounded(lora_B, s, dy)), kept_value(threshold), dy)",
            "rounded(product_of(rows, rounded(lora_B, s, dy)), 1.0f, dy)",
        ),
        (
            "few-rows-C-unrounded",
            "of few rows g is made of an unrounded C",
            "product_of(rows, rounded(lora_B, s, dy))",
            "product_of(rows, rounded(lora_B, s, rows))",
        ),
        (
            "few-rows-g-unrounded",
            "of few rows dx and dA are made of an unrounded g",
            'kept_value(threshold), dy), "g", r)',
            'kept_value(threshold), rows), "g", r)',
        ),
        ("few-rows-dx-undropped", "of few rows dx has no mask", '"dx", K, mask)', '"dx", K)'),
        ("few-rows-dA-undropped", "of few rows dA has no mask", 'widened(x, "x", K, mask)', 'widened(x, "x", K)'),
        (
            "few-rows-dB-unscaled",
            "of few rows dB is not scaled",
            'widened(q, "q", r), s);',
            'widened(q, "q", r), 1.0f);',
        ),
        ("nine-rows-pass", "nine rows are taken for eight", "M <= kFewRows,", "M <= kFewRows + 1,"),
        ("overlap-passes", "rows of y may overlap", "y.stride(0) >= N,", "y.stride(0) >= 0,"),
    ],
)

_WRAPPERS = mutants_of(
    "clora_kernels/kernels/routed_lora/compiled.py",
    "compiled",
    ("tests/test_routed_lora_operator_errors.py", *_LAYER),
    [
        ("row-0", "expand masks from row 0 on", "first_row, accumulate)\n    return y", "0, accumulate)\n    return y"),
        (
            "takes-fp64",
            "it is said to take fp64",
            "return big.is_cpu and big.dtype != torch.float64",
            "return big.is_cpu",
        ),
        (
            "never-accumulates",
            "expand overwrites y",
            "first_row, accumulate)\n    return y",
            "first_row, False)\n    return y",
        ),
        ("drops-nothing", "no draw reaches an operator", "(None, None) if dropout is None", "(None, None) if True"),
        ("folds-strided", "fold is said to take any strides", "        and small.stride(1) == 1\n", ""),
        (
            "fake-transposed",
            "the fake C is transposed",
            "like.new_empty(small.shape[1], small.shape[0])",
            "like.new_empty(small.shape[0], small.shape[1])",
        ),
    ],
)

_RULE = mutants_of(
    "clora_kernels/dispatch/routed_lora.py",
    "dispatch-native",
    _LAYER,
    [
        ("never-by-itself", "auto never takes it", 'if backend in ("auto", "native"):', 'if backend == "native":'),
        (
            "for-any-work",
            "auto takes it for any work",
            "layer.has_little_work(math.prod(x.shape[:-1]), *projections[0][1:3])",
            "True",
        ),
        (
            "not-refused",
            "named it falls back in silence",
            'if backend == "native" and why_not:',
            'if backend == "natively" and why_not:',
        ),
        (
            "reason",
            "auto's choice is said to be the caller's",
            '_NAMED if backend == chosen else "a plain layer with little to compute"',
            "named",
        ),
    ],
)

_SHORTCUTS = mutants_of(
    "clora_kernels/autograd/routed_lora/arguments.py",
    "shortcuts",
    ("tests/test_routed_lora_shortcuts.py",),
    [
        (
            "inference-kept",
            "a scalar of inference mode is kept",
            "torch.inference_mode(False), torch._C.DisableTorchFunction()",
            "torch._C.DisableTorchFunction()",
        ),
        (
            "mode-kept",
            "what a mode made is kept",
            "torch.inference_mode(False), torch._C.DisableTorchFunction()",
            "torch.inference_mode(False)",
        ),
        (
            "fake-kept",
            "a fake scalar is kept",
            "if traced or not isinstance(value, (float, int)):",
            "if not isinstance(value, (float, int)):",
        ),
        ("rank-0-passes", "rank 0 passes at a glance", "        and r > 0\n", ""),
        ("dtype-passes", "a weight of another dtype passes at a glance", "        and weight.dtype == x.dtype\n", ""),
        (
            "frozen-passes",
            "a frozen routing without routing passes at a glance",
            "without_options = j.routing is j.frozen_routing is",
            "without_options = j.routing is",
        ),
    ],
)

NATIVE = [*_BLOCKS, *_FEW_ROWS, *_ROUNDING, *_OPERATOR, *_WRAPPERS, *PLAIN_LAYER, *_RULE, *_SHORTCUTS]
