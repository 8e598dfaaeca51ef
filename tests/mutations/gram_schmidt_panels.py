"""Mutants of what the compiled Gram-Schmidt is made of: panels, tiles, small matrices."""

from .mutant import mutants_of

_TESTS = (
    "tests/test_gram_schmidt_parity.py",
    "tests/test_gram_schmidt_zoo.py",
    "tests/test_gram_schmidt_native.py",
    "tests/test_gram_schmidt_options.py",
    "tests/test_gram_schmidt_transforms.py",
)

PANELS = [
    *mutants_of(
        "csrc/gram_schmidt_blocks.h",
        "gs-native-blocks",
        _TESTS,
        [
            ("any-type-in-place", "a 16-bit matrix is worked on where it lies",
             "return m.type == ScalarType::Float && m.column_stride",
             "return m.column_stride"),
            ("any-stride-in-place", "a strided matrix is worked on where it lies",
             "m.column_stride == 1 && m.columns % kPad == 0",
             "m.columns % kPad == 0"),
            ("edges-in-place", "rows beyond the matrix are worked on",
             "m.columns % kPad == 0 && n % kPad == 0 && m",
             "m.columns % kPad == 0 && m"),
            ("columns-in-place", "columns beyond the matrix are worked on",
             "m.column_stride == 1 && m.columns % kPad == 0 && n",
             "m.column_stride == 1 && n"),
            ("written-nowhere", "what was made in a buffer is not written",
             "    if (is_panel(m, n)) return;\n    with_type",
             "    if (m.rows) return;\n    with_type"),
            ("batch-stride-in-elements", "16-bit matrices are as far apart as fp32 ones",
             "== ScalarType::Float ? 4 : 2;",
             "== ScalarType::Float ? 4 : 4;"),
            ("sums-stay", "sums are counted twice",
             "    std::fill_n(sums, floats_of_sums(na, nb), 0.0f);\n",
             ""),
            ("last-block", "rows beyond a whole block are lost",
             "body(row, std::min(rows, end - row));",
             "if (row + rows <= end) body(row, rows);"),
            ("splits-rounded-down", "the last split is lost",
             "(d + kSplitRows - 1) / kSplitRows, 1)",
             "d / kSplitRows, 1)"),
        ],
    ),
    *mutants_of(
        "csrc/panels.h",
        "gs-native-panels",
        _TESTS,
        [
            ("transposed-wrong", "rows and columns of eight vectors are mixed",
             "2, 3, 10, 11, 6, 7, 14, 15);\n    }",
             "2, 3, 10, 11, 6, 7, 15, 14);\n    }"),
            ("bf16-cut", "bf16 is not rounded",
             "(bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;",
             "bits >> 16;"),
            ("widen-rest", "the last elements of a run are not read",
             "  for (; i < count; ++i) to[i] = T::from(from[i]);",
             "  for (; i + 1 < count; ++i) to[i] = T::from(from[i]);"),
            ("narrow-rest", "the last elements of a run are not written",
             "  for (; i < count; ++i) to[i] = T::to(from[i]);",
             "  for (; i + 1 < count; ++i) to[i] = T::to(from[i]);"),
        ],
    ),
]  # fmt: skip
