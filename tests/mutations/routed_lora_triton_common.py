"""Mutants of what the Triton kernels share."""

from .mutant import Mutant, mutants_of

_FOLDER = "clora_kernels/kernels/routed_lora/triton"
_MASKS = ("tests/test_routed_lora_triton_linear.py", "tests/test_routed_lora_triton_parts.py")
_SPLITS = ("tests/test_routed_lora_triton_primitives.py",)
_COMPILED = ("tests/test_routed_lora_triton_forms.py",)

TRITON_COMMON: list[Mutant] = []
TRITON_COMMON += mutants_of(
    f"{_FOLDER}/common.py",
    "triton-common",
    _MASKS,
    [
        ("kept-column", "the columns of a mask begin at 0",
         "offs_g = first_column // 8 +", "offs_g = 0 * first_column +"),
        ("kept-groups", "rows of a mask of a group too few", "groups = tl.cdiv(columns, 8)", "groups = columns // 8"),
        ("kept-int32", "the index of a group is 32 bits wide",
         "offs_m.to(tl.int64)[:, None] * groups", "offs_m[:, None] * groups"),
        ("kept-high", "the upper half of the index is lost",
         "(index >> 32).to(tl.uint32)", "(index & 0).to(tl.uint32)"),
        ("kept-words", "the words in another order",
         "tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))"),
        ("kept-halves", "the high half first",
         "tl.join((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)",
         "tl.join((words >> 16) >= threshold, (words & 0xFFFF) >= threshold)"),
        ("kept-equal", "what equals the threshold drops", "(words >> 16) >= threshold", "(words >> 16) > threshold"),
        ("kept-value", "the kept value is 1",
         "tl.where(threshold < 65536, tl.div_rn", "tl.where(threshold < 0, tl.div_rn"),
        ("load-rows-int32", "rows are addressed in 32 bits",
         "rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column\n    return",
         "rows[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column\n    return"),
        ("load-columns-int32", "columns are addressed in 32 bits",
         "rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column\n    return",
         "rows.to(tl.int64)[:, None] * stride_row + columns[None, :] * stride_column\n    return"),
        ("store-rows-int32", "rows are written at addresses of 32 bits",
         "rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column\n    tl.store",
         "rows[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column\n    tl.store"),
        ("store-columns-int32", "columns are written at addresses of 32 bits",
         "rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column\n    tl.store",
         "rows.to(tl.int64)[:, None] * stride_row + columns[None, :] * stride_column\n    tl.store"),
        ("load-not-zero", "what is masked is not 0", "mask_columns[None, :], other=0.0)", "mask_columns[None, :])"),
        ("load-unmasked-rows", "rows are not masked",
         "mask=mask_rows[:, None] & mask_columns[None, :], other",
         "mask=(mask_rows[:, None] | True) & mask_columns[None, :], other"),
        ("store-unmasked-columns", "columns are not masked",
         "mask=mask_rows[:, None] & mask_columns[None, :])\n",
         "mask=mask_rows[:, None] & (mask_columns[None, :] | True))\n"),
        ("precision-16", "16 bit is multiplied as tf32", "dtype == torch.float32 and torch.backends", "torch.backends"),
        ("precision", "tf32 is not asked for",
         '"tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32',
         '"tf32" if dtype == torch.float32'),
        ("chunks-of-512", "terms share a read beyond 256 ranks", "> MOST_RANKS:", "> 2 * MOST_RANKS:"),
        ("chunk-again", "a chunk begins where the last did", "        start = stop\n", "        start += 1\n"),
        ("class-of-12", "compute capability 12 takes the tiles of 9",
         "properties.major in (9, 10, 11)", "properties.major >= 9"),
        ("scalar-copied", "a scalar stays on its device", "    if scalar.device == device:\n", "    if True:\n"),
        ("scalar-fp32", "a scalar in the default dtype", "dtype=scalar.dtype, device=device", "device=device"),
        ("device-current", "the launch is on the current device",
         "    return torch.cuda.device(t.device)\n", "    return nullcontext()\n"),
    ],
)  # fmt: skip
TRITON_COMMON += mutants_of(
    f"{_FOLDER}/common.py",
    "triton-common",
    _SPLITS,
    [
        ("split-beyond", "more scratch than is allowed", "min(wanted, SCRATCH_BYTES // part_bytes)", "wanted"),
        ("split-programs", "one part a device", "tile.per_sm * programs(t), blocks)", "tile.per_sm, blocks)"),
        ("split-steps", "parts of less steps than the tile says", "steps // tile.least_steps", "steps"),
        ("split-most", "more parts than the tile says", ", tile.most_splits)", ", 999)"),
    ],
)  # fmt: skip
TRITON_COMMON += mutants_of(
    f"{_FOLDER}/common.py",
    "triton-common",
    _COMPILED,
    [
        ("dot-tf32", "fp32 is rounded to tf32, as is Triton's default", ", input_precision=PRECISION)", ")"),
    ],
)  # fmt: skip
TRITON_COMMON += mutants_of(
    f"{_FOLDER}/forms.py",
    "triton-forms",
    _COMPILED,
    [
        ("M-aligned", "M is compiled as a multiple of 16", 'UNALIGNED = ("M", "steps"', 'UNALIGNED = ("steps"'),
        ("strings-are-types", "a constant that is a string passes for a type",
         "isinstance(value, str) and value.startswith((\"*\", \"i32\", \"fp32\", \"tensordesc\"))",
         "isinstance(value, str)"),
        ("expects-nothing", "a form expects what it was not told", "expects or Expects()", "Expects(wgmma=False)"),
        ("small-tile", "the tile of a small call", '"bucket": 9, **key', '**key, "bucket": 0'),
        ("warps", "the warps of a tile are forgotten", '"num_warps": tile.num_warps', '"num_warps": 4'),
        ("architecture", "a form is for one architecture alone", "(architecture,)", "(80, 90)"),
    ],
)  # fmt: skip
