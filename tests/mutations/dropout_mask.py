"""Mutants of the dropout mask: its definition, its choice of a path, its C++."""

from .mutant import mutants_of

_TESTS = ("tests/test_dropout_mask.py",)

_DEFINITION = mutants_of(
    "clora_kernels/reference/dropout_mask.py",
    "mask",
    _TESTS,
    [
        ("nine-rounds", "one round of Philox too few", "for _ in range(10):", "for _ in range(9):"),
        ("multiplier", "another multiplier", "0xD2511F53", "0xD2511F55"),
        ("key-step", "another step of the key", "0x9E3779B9", "0x9E3779B1"),
        (
            "key-words-swapped",
            "the words of the key change places",
            "(seed & _WORD, (seed >> 32) & _WORD))",
            "((seed >> 32) & _WORD, seed & _WORD))",
        ),
        (
            "seed-cut",
            "only the low word of the seed counts",
            "(seed & _WORD, (seed >> 32) & _WORD))",
            "(seed & _WORD, zero))",
        ),
        (
            "counter-cut",
            "only the low word of the counter counts",
            "(index & _WORD, index >> 32,",
            "(index & _WORD, zero,",
        ),
        (
            "carry-lost",
            "the high half of a product lacks a carry",
            "high = (by_high + (by_low >> 16)) >> 16",
            "high = by_high >> 16",
        ),
        ("threshold-included", "an element at the threshold drops", "(lanes >= threshold)", "(lanes > threshold)"),
        (
            "lanes-swapped",
            "the high half of a word comes first",
            "for half in (word & 0xFFFF, word >> 16)]",
            "for half in (word >> 16, word & 0xFFFF)]",
        ),
        (
            "rows-ignored",
            "the first row does not count",
            "index = first_row * groups + torch.arange",
            "index = 0 * first_row * groups + torch.arange",
        ),
        (
            "row-by-columns",
            "rows are counted in columns, not in groups",
            "index = first_row * groups + torch.arange",
            "index = first_row * columns + torch.arange",
        ),
        (
            "groups-cut",
            "the last columns share a counter with the next row",
            "groups = (columns + _GROUP - 1) // _GROUP",
            "groups = max(columns // _GROUP, 1) + (columns % _GROUP > 1)",
        ),
    ],
)

_CHOICE = mutants_of(
    "clora_kernels/kernels/dropout_mask.py",
    "mask-path",
    (*_TESTS, "tests/test_routed_lora_dropout.py"),
    [
        (
            "row-0-compiled",
            "the compiled mask starts at row 0",
            "dropout_mask.default(seed, threshold, first_row, rows, columns)",
            "dropout_mask.default(seed, threshold, 0 * first_row, rows, columns)",
        ),
        (
            "row-0-plain",
            "the plain mask starts at row 0",
            "return reference.dropout_mask(seed, threshold, first_row, rows, columns)",
            "return reference.dropout_mask(seed, threshold, 0 * first_row, rows, columns)",
        ),
        (
            "never-compiled",
            "the compiled mask is not used",
            'if extension.has_op("dropout_mask", seed.device.type):',
            'if extension.has_op("dropout_mask", "meta"):',
        ),
        (
            "fake-shape",
            "the fake mask is transposed",
            "return seed.new_empty((rows, columns), dtype=torch.bool)",
            "return seed.new_empty((columns, rows), dtype=torch.bool)",
        ),
        (
            "fake-dtype",
            "the fake mask is not bool",
            "return seed.new_empty((rows, columns), dtype=torch.bool)",
            "return seed.new_empty((rows, columns), dtype=torch.uint8)",
        ),
        (
            "warns-never",
            "the missing binary is not told",
            '    extension.warn_once("dropout_mask", seed.device.type)\n',
            "",
        ),
    ],
)

_FUNCTION = mutants_of(
    "clora_kernels/autograd/dropout_mask.py",
    "mask-function",
    ("tests/test_dropout_mask.py", "tests/test_routed_lora_dropout.py", "tests/test_routed_lora_errors.py"),
    [
        (
            "another-row",
            "the mask begins at the second row",
            "return kernel(seed, threshold, 0,",
            "return kernel(seed, threshold, 1,",
        ),
        (
            "rows-of-one-sample",
            "every sample shares a mask",
            "math.prod(x.shape[:-1]), x.shape[-1]).reshape(x.shape)",
            "x.shape[-2], x.shape[-1]).expand(x.shape)",
        ),
        (
            "without-seed",
            "a mask without a seed is not refused",
            "    if dropout_seed is None:\n",
            "    if dropout_p is None:\n",
        ),
        (
            "nothing-kept-at-p-0",
            "p = 0 drops everything",
            "return torch.ones(x.shape,",
            "return torch.zeros(x.shape,",
        ),
    ],
)

_PHILOX = mutants_of(
    "csrc/philox.h",
    "philox",
    _TESTS,
    [
        ("nine-rounds", "one round too few", "round < 10;", "round < 9;"),
        ("key-step", "another step of the key", "key_high += 0xBB67AE85u;", "key_high += 0xBB67AE87u;"),
        (
            "counter-cut",
            "only the low word of the counter counts",
            "static_cast<uint32_t>(index >> 32), 0u, 0u}}",
            "0u, 0u, 0u}}",
        ),
        (
            "threshold-included",
            "an element at the threshold drops",
            "(word & 0xFFFFu) >= threshold)",
            "(word & 0xFFFFu) > threshold)",
        ),
        (
            "words-swapped",
            "the third and the fourth word change places",
            "return {kept_pair(w.word[0], threshold) | kept_pair(w.word[1], threshold) << 16,\n"
            "          kept_pair(w.word[2], threshold)",
            "return {kept_pair(w.word[0], threshold) | kept_pair(w.word[1], threshold) << 16,\n"
            "          kept_pair(w.word[1], threshold)",
        ),
    ],
)

_NATIVE = mutants_of(
    "csrc/dropout_mask.cpp",
    "mask-native",
    _TESTS,
    [
        (
            "first-row-ignored",
            "blocks are counted from row 0",
            "kept_block(static_cast<uint64_t>(shape.first_group + block),",
            "kept_block(static_cast<uint64_t>(block),",
        ),
        (
            "seed-cut",
            "only the low word of the seed counts",
            "static_cast<uint32_t>(key >> 32), threshold, bytes);",
            "0u, threshold, bytes);",
        ),
        (
            "columns-overrun",
            "a row is written a group too far",
            "std::min(run * kGroup, shape.columns - column)",
            "std::min(run * kGroup, shape.columns - column + 1)",
        ),
        (
            "block-misread",
            "the second row of a block takes the elements of the first",
            "      source += run * kGroup;\n",
            "",
        ),
        (
            "last-thread-lost",
            "the last group is not filled",
            "parallel_for(0, shape.groups(), kGroupsPerThread,",
            "parallel_for(0, std::max<int64_t>(shape.groups() - 1, 0), kGroupsPerThread,",
        ),
    ],
)

_CHECKS = mutants_of(
    "csrc/dropout_mask.h",
    "mask-native",
    _TESTS,
    [
        (
            "threshold-unchecked",
            "a threshold above 65536 is not refused",
            "0 <= least && least <= 65536,",
            "0 <= least,",
        ),
    ],
)

DROPOUT_MASK = [*_DEFINITION, *_CHOICE, *_FUNCTION, *_PHILOX, *_NATIVE, *_CHECKS]
