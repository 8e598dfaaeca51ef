"""Mutants of the compiled CPU operators of rank-1 experts: what they refuse, their loops, the ways of their sums."""

from .mutant import mutants_of

_TESTS = ("tests/test_rank1_experts_native*.py",)

NATIVE = [
    *mutants_of(
        "csrc/rank1_experts.cpp",
        "experts-native",
        _TESTS,
        [
            ("index-behind-the-pool", "the index behind the last expert passes",
             "largest < static_cast<uint64_t>(experts)) return;",
             "largest <= static_cast<uint64_t>(experts)) return;"),
            ("shrink-of-no-columns", "shrink leaves anything where rows have no columns",
             "  if (n == 0) std::fill_n(",
             "  if (n < 0) std::fill_n("),
            ("base-forgotten", "expand_ takes no base",
             "base.has_value() ? &under : nullptr, any_rows(y)};",
             "nullptr, any_rows(y)};"),
            ("order-unstable", "the choices of an expert are in reverse order",
             "for (int64_t i = 0; i < count; ++i) order[",
             "for (int64_t i = count - 1; i >= 0; --i) order["),
            ("order-unchecked", "an order may name the choice behind the last",
             "choices == 0 || largest < choices",
             "choices == 0 || largest <= choices"),
            ("starts-fall", "starts may fall",
             " && least >= 0",
             ""),
            ("expert-between-threads", "the first expert of every range but the first is left out",
             "run(m, s, expert_at(begin, c, first), ",
             "run(m, s, expert_at(begin, c, first) + (begin > 0), "),
            ("group-sums-in-the-first-columns", "sums made group by group all go to the first columns",
             "s.out.from_column(left)",
             "s.out.from_column(0)"),
        ],
    ),
    *mutants_of(
        "csrc/rank1_experts_blocks.h",
        "experts-native-blocks",
        _TESTS,
        [
            ("lost-is-lost", "what sums of chains lose by rounding is not kept",
             "lost[j] = term - (sum - sums[j]);",
             "lost[j] = 0.0f;"),
        ],
    ),
    *mutants_of(
        "csrc/rank1_experts_choices.h",
        "experts-native-choices",
        _TESTS,
        [
            ("one-choice", "all choices of a piece are its first",
             "indices[std::min(first + i, last)]",
             "indices[std::min(first, last)]"),
        ],
    ),
    *mutants_of(
        "csrc/rank1_experts_reduce.h",
        "experts-native-reduce",
        _TESTS,
        [
            ("factors-forgotten", "rows that choose alone count once each",
             "s.small == nullptr ? 1.0f : s.small[choice]",
             "1.0f"),
            ("last-row-of-a-group", "the last row of a group does not count",
             "if (++walk.row == c.length) ",
             "if (++walk.row == c.length - 1) "),
            ("blocks-begin-anew", "every block of rows begins with the first choice of an expert",
             "      at[expert] = static_cast<int32_t>(next);\n",
             ""),
            ("long-groups", "rows of a group beyond the first 64 do not count",
             "if (done == 0) continue;",
             "if (done >= 0) continue;"),
        ],
    ),
    *mutants_of(
        "csrc/rank1_experts_fp64.h",
        "experts-native-fp64",
        _TESTS,
        [
            ("base-forgotten", "expand_ in fp64 takes no base",
             "base.data == nullptr ? sums[j]",
             "base.data == nullptr || j >= 0 ? sums[j]"),
            ("slot-of-the-group", "every choice has the factor of the first slot",
             "slot = order[p] % c.k;",
             "slot = 0;"),
        ],
    ),
    *mutants_of(
        "csrc/rank1_experts_kernels.h",
        "experts-native-kernels",
        _TESTS,
        [
            ("first-row-of-a-range", "the first row of a thread's range is left out of expand_",
             "expand_rows(experts, s, b, e);",
             "expand_rows(experts, s, b + 1, e);"),
        ],
    ),
]  # fmt: skip
