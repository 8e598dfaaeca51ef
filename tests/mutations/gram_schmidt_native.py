"""Mutants of the compiled Gram-Schmidt: its sweeps, its judgement, its deflation, its backward, and their panels."""

from .mutant import mutants_of

_TESTS = tuple(f"tests/test_gram_schmidt_{what}.py" for what in ("native", "zoo", "parity", "options", "transforms"))

_FORWARD = mutants_of(
    "csrc/gram_schmidt.cpp",
    "gs-native",
    _TESTS,
    [
        ("one-sweep", "no matrix gets a second sweep", "while (state == kAgain && sweeps < 2)",
         "while (state == kAgain && sweeps < 1)"),
        ("hard-unheard", "a hard matrix keeps what sweeps make of it", "if (state == kHard) return deflate(p);",
         "if (state == kHard && p.V.columns > 1000) return deflate(p);"),
        ("stale-panels", "panels kept of one matrix serve the next", "    is_read_ = false;\n", ""),
        ("second-sweep-of-V", "a sweep begins with V again", "        v = to;\n", ""),
        ("P-unapplied", "P·T is not subtracted", "        if (k_) layout_.outer(n, basis, k_, sweeps_[s].T.data()",
         "        if (k_ < 0) layout_.outer(n, basis, k_, sweeps_[s].T.data()"),
        ("splits-unsummed", "rows beyond the first split do not count",
         "for (int64_t split = 1; split < splits_; ++split) {\n      for (int64_t i = 0; i < size",
         "for (int64_t split = splits_; split < splits_; ++split) {\n      for (int64_t i = 0; i < size"),
        ("gathered-late", "fp32 sums run over all rows", "if ((row + n) % layout_.rows_of_sums() == 0) gather();", ""),
        ("gathered-never", "the last sums are lost", "        gather();\n      }\n    });\n    is_read_ = true;",
         "      }\n    });\n    is_read_ = true;"),
        ("R-of-one-sweep", "R is that of the first sweep", "if (sweeps == 2) {", "if (sweeps == 3) {"),
        ("R-not-cleared", "R holds anything below its diagonal", "j < i ? 0.0f : static_cast<float>(R[i * ld_ + j])",
         "static_cast<float>(R[(j < i ? j : i) * ld_ + j])"),
        ("rank-of-the-deflated", "the rank of a deflated matrix is r", "*p.rank = static_cast<int32_t>(deflated(",
         "*p.rank = static_cast<int32_t>(0 * r_ + r_ + 0 * deflated("),
        ("NaN-of-P", "a basis with NaN is not seen", "finite &= read_double(p.P.as<decltype(type)>(), W, ld);",
         "read_double(p.P.as<decltype(type)>(), W, ld);"),
        ("NaN-unsaid", "the rank of a matrix with NaN is 0", "      *p.rank = -1;", "      *p.rank = 0;"),
        ("strides-of-deflation", "a strided matrix is read as if it were dense", "T::from(m.data[i * m.row_stride + j * m.column_stride]);\n      out",
         "T::from(m.data[i * m.columns + j]);\n      out"),
        ("list-of-the-first", "a list is one of the matrices of its first entry", "const int64_t b = at - first[i];",
         "const int64_t b = at - first[0];"),
        ("batch-unchecked", "a basis of another batch is taken", "P.size(0) == V.size(0) && P.size(1)", "P.size(1)"),
    ],
)  # fmt: skip

_BACKWARD = mutants_of(
    "csrc/gram_schmidt_backward.cpp",
    "gs-native-backward",
    ("tests/test_gram_schmidt_parity.py", *_TESTS),
    [
        ("Q-unseen", "D₀ lacks Q·Z", "{&p.Q, Z_.rounded(), Shape::kFull}};", "{&p.Q, std::vector<float>(Z_.data.size()), Shape::kFull}};"),
        ("V-unseen", "D₀ lacks the dependent columns", "if (deficient) terms.push_back(", "if (deficient && r_ > 1000) terms.push_back("),
        ("P-unseen", "dV is not orthogonal to P", "(inside + A).negative().rounded()", "inside.negative().rounded()"),
        ("inside-unseen", "dV lacks what P takes of the dependent columns", "(inside + A).negative().rounded()", "A.negative().rounded()"),
        ("dP-of-V", "dP lacks −V·Aᵀ", "N * T + A.transposed() : A.transposed()", "N * T : Small(r_, k_)"),
        ("dP-of-Q", "dP lacks Q", "{&p.Q, (Z_ * T).negative()", "{&p.Q, (Z_ * T)"),
        ("dropped-kept", "dependent columns count as independent", "= p.R[j * r_ + j] != 0;", "= p.R[j * r_ + j] >= 0;"),
        ("M-full", "QᵀdQ is not mirrored", "U_(i, j) = U_(j, i) = both ? U_(i, j) - QdQ(i, j) : 0.0;",
         "U_(i, j) = both ? U_(i, j) - QdQ(i, j) : 0.0;"),
        ("M-of-the-diagonal", "M lacks what is far from its diagonal", "multiply(j + columns, r_ - j, columns,", "multiply(j + columns, columns, columns,"),
        ("QdQ-lost", "M lacks QᵀdQ", "both ? U_(i, j) - QdQ(i, j) : 0.0", "both ? U_(i, j) : 0.0"),
        ("dropped-in-M", "M lacks the dependent columns", "if (deficient) U_ = U_ +", "if (deficient && r_ > 1000) U_ = U_ +"),
        ("stale-scratch", "what one matrix left is in the next", "for (Small* m : {&R_, &Rt_, &dR_, &X_, &U_, &Z_}) m->clear();",
         "for (Small* m : {&R_, &Rt_, &dR_, &X_}) m->clear();"),
        ("splits-unsummed", "rows beyond the first split do not count", "total.data[i] += part.data[i];", "total.data[i] += 0 * part.data[i];"),
        ("terms-overwritten", "the last term alone", "            add = true;\n", ""),
        ("sizes-unchecked", "a Q of other rows is taken", "V[i].size(1) && (!columns ||", "tensors[i].size(1) && (!columns ||"),
    ],
)  # fmt: skip

_STEP = mutants_of(
    "csrc/gram_schmidt_step.h",
    "gs-native-step",
    _TESTS,
    [
        ("always-done", "one sweep is enough", "constexpr double kEnough = 6.0,", "constexpr double kEnough = 6e6,"),
        ("always-faithful", "what R makes of roundings is never too much", "kFaithful = 4.0;", "kFaithful = 4e6;"),
        ("limits-unwatched", "squares may overflow", "if (!(norms[j] > 1 / kLimit && norms[j] < kLimit)) return false;", ""),
        ("S-unscaled", "S is that of V as it is", "S[i * ld + j] *= scale[j];", "S[i * ld + j] *= 1.0;"),
        ("S-unsubtracted", "the Gram matrix keeps what lies in the basis",
         "for (int64_t i = 0; i < r; ++i) subtract(k, S + i, ld, S, ld, i / 4 * 4, ld, G + i * ld);", ""),
        ("T-of-S", "T is S", "subtract(std::min<int64_t>(4, r - first), negated + first, 1, X + first * ld, ld, first, ld, T + i * ld);",
         "T[i * ld + first] = S[i * ld + first];"),
        ("T-added", "P·T is added", "t[i] = -static_cast<float>(T[i]);", "t[i] = static_cast<float>(T[i]);"),
        ("X-unscaled", "X is that of unit columns", "static_cast<float>(X[i * ld + j] * scale[i])", "static_cast<float>(X[i * ld + j])"),
        ("R-unscaled", "R is that of unit columns", "for (int64_t j = i; j < r; ++j) G[i * ld + j] *= norms[j];", ""),
        ("doubt-unheard", "a column that may be dependent is taken for independent", " && pivot > 1.1 * rank_tol;", ";"),
        ("pivot-of-the-first", "the first pivot alone is looked at", "    pivot = std::min(pivot, G[i * ld + i]);\n", ""),
    ],
)  # fmt: skip

_DEFLATE = mutants_of(
    "csrc/gram_schmidt_deflate.h",
    "gs-native-deflate",
    ("tests/test_gram_schmidt_zoo.py", *_TESTS),
    [
        ("projected-once", "columns are projected once on what lies before their group", "for (int64_t pass = 0; pass < 2 && place > 0; ++pass) {",
         "for (int64_t pass = 0; pass < 1 && place > 0; ++pass) {"),
        ("group-once", "columns of a group are projected once on each other", "for (int64_t pass = 0; pass < 2; ++pass) {\n      double c[kPad];",
         "for (int64_t pass = 0; pass < 1; ++pass) {\n      double c[kPad];"),
        ("absolute", "the tolerance is not relative", "norm > rank_tol * own[j]", "norm > rank_tol"),
        ("dropped-kept", "a dependent column is not zero in Q", "w[row] = kept ? w[row] * scale : 0.0;", "w[row] = kept ? w[row] * scale : w[row];"),
        ("diagonal-of-dropped", "a dependent column has its norm in R", "= kept ? norm : 0.0;", "= norm;"),
        ("R-of-the-group", "R lacks what lies before the group", "R[i * ldr + first + j] += C[(m + i) * kPad + j];", ""),
        ("R-once", "R lacks the first projection", "R[(first + i) * ldr + first + j] += c[i];", "R[(first + i) * ldr + first + j] = c[i];"),
        ("last-rows", "rows beyond a multiple of four are not projected", "for (int64_t row = whole; row < d; ++row) {", "for (int64_t row = d; row < d; ++row) {"),
        ("sign-stays", "R has the sign of what is subtracted", "  for (int64_t i = 0; i < m * kPad; ++i) C[i] = -C[i];\n}", "}"),
    ],
)  # fmt: skip

_PANELS = mutants_of(
    "csrc/gram_schmidt_blocks.h",
    "gs-native-blocks",
    _TESTS,
    [
        ("any-type-in-place", "a 16-bit matrix is worked on where it lies", "return m.type == ScalarType::Float && m.column_stride", "return m.column_stride"),
        ("any-stride-in-place", "a strided matrix is worked on where it lies", "m.column_stride == 1 && m.columns % kPad == 0", "m.columns % kPad == 0"),
        ("edges-in-place", "rows beyond the matrix are worked on", "m.columns % kPad == 0 && n % kPad == 0 && m", "m.columns % kPad == 0 && m"),
        ("columns-in-place", "columns beyond the matrix are worked on", "m.column_stride == 1 && m.columns % kPad == 0 && n", "m.column_stride == 1 && n"),
        ("written-nowhere", "what was made in a buffer is not written", "    if (is_panel(m, n)) return;\n    with_type", "    if (m.rows) return;\n    with_type"),
        ("batch-stride-in-elements", "16-bit matrices are as far apart as fp32 ones", "== ScalarType::Float ? 4 : 2;", "== ScalarType::Float ? 4 : 4;"),
        ("sums-stay", "sums are counted twice", "    std::fill_n(sums, floats_of_sums(na, nb), 0.0f);\n", ""),
        ("last-block", "rows beyond a whole block are lost", "body(row, std::min(rows, end - row));", "if (row + rows <= end) body(row, rows);"),
        ("splits-rounded-down", "the last split is lost", "(d + kSplitRows - 1) / kSplitRows, 1)", "d / kSplitRows, 1)"),
    ],
) + mutants_of(
    "csrc/panels.h",
    "gs-native-panels",
    _TESTS,
    [
        ("transposed-wrong", "rows and columns of eight vectors are mixed", "2, 3, 10, 11, 6, 7, 14, 15);\n    }", "2, 3, 10, 11, 6, 7, 15, 14);\n    }"),
        ("bf16-cut", "bf16 is not rounded", "(bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;", "bits >> 16;"),
        ("bf16-NaN", "NaN becomes a number", "(is_nan & (bits >> 16 | 0x40u)) |", "(is_nan & 0x40u) |"),
        ("widen-rest", "the last elements of a run are not read", "  for (; i < count; ++i) to[i] = T::from(from[i]);", "  for (; i + 1 < count; ++i) to[i] = T::from(from[i]);"),
        ("narrow-rest", "the last elements of a run are not written", "  for (; i < count; ++i) to[i] = T::to(from[i]);", "  for (; i + 1 < count; ++i) to[i] = T::to(from[i]);"),
        ("padding-of-rows", "rows beyond a panel hold anything", "  for (int64_t i = n; i < padded(n); ++i) std::fill_n(panel + i * ld, width, 0.0f);\n", ""),
        ("four-columns", "four columns are exchanged", "read_four<T>(from + done * 4, panel + done, ld);", "read_four<T>(from + done * 4, panel + done, ld), std::swap(panel[done], panel[done + ld]);"),
        ("lanes-lost", "a lane of the sums is lost", "for (int64_t l = 0; l < kLanes; ++l) sum +=", "for (int64_t l = 1; l < kLanes; ++l) sum +="),
        ("sums-stay", "sums are counted twice", "      at(lanes) = Vector{};\n", ""),
        ("triangle-too-small", "the triangle of X lacks its last columns", "shape == Shape::kUpper ? std::min(na, j + kFew) : na;\n      for", "shape == Shape::kUpper ? std::min(na, j) : na;\n      for"),
        ("add-ignored", "a second product overwrites the first", "acc[v][0] = add ? at(place) : Vector{};", "acc[v][0] = Vector{};"),
    ],
)  # fmt: skip

_TILES = mutants_of(
    "csrc/tile.h",
    "gs-native-tile",
    _TESTS,
    [
        ("triangle-too-small", "the triangle of a product lacks its last rows", "last = upper ? std::min(na, j + width) : na;", "last = upper ? std::min(na, j + 1) : na;"),
        ("upper-too-small", "a triangular factor is cut short", "(shape == Shape::kUpper ? std::min(na, j + width) : na) - first;", "(shape == Shape::kUpper ? std::min(na, j + 4) : na) - first;"),
        ("lower-too-small", "a triangular factor begins late", "shape == Shape::kLower ? std::min(j, na) : 0;", "shape == Shape::kLower ? std::min(j + 4, na) : 0;"),
        ("add-ignored", "a second product overwrites the first", "add ? vector_at(place) + acc[m][v] : acc[m][v];", "acc[m][v];"),
        ("second-vector", "the second vector is the first", "vector_at(b + i * b_step + v * lanes);", "vector_at(b + i * b_step);"),
        ("narrow-tiles-misplaced", "what is left of a product goes to its begin", "tile<S, 8, 1>(count, a + k * lda + first, lda, 1, factors, ldx, out + k * ldo + j, ldo, add);",
         "tile<S, 8, 1>(count, a + k * lda + first, lda, 1, factors, ldx, out + k * ldo, ldo, add);"),
    ],
) + mutants_of(
    "csrc/small.h",
    "gs-native-small",
    _TESTS,
    [
        ("dot-rest", "the last elements of a product do not count", "  for (; i < count; ++i) sum += a[i] * b[i];\n", ""),
        ("subtract-rest", "the last rows are not subtracted", "  for (; l < count; ++l) {\n    const double c", "  for (; l + 1 < count; ++l) {\n    const double c"),
        ("pivot-unread", "a pivot of no sign is taken", "if (!(row[i] > 0)) return false;", ""),
        ("below-the-diagonal", "R keeps what was below its diagonal", "for (int64_t j = 0; j < i; ++j) row[j] = 0;", ""),
        ("blocks-apart", "blocks of the Cholesky do not meet", "inner_panels<double>(kSmallBlock, scratch + last, ld, r - last,", "inner_panels<double>(0, scratch + last, ld, r - last,"),
        ("inverse-of-blocks", "blocks of the inverse do not meet", "outer_panels<double>(kSmallBlock, scratch + last, ld, r - last, X + last", "outer_panels<double>(0, scratch + last, ld, r - last, X + last"),
        ("product-of-triangles", "rows after the diagonal are left out", "const int64_t first = upper ? std::min(i, n) : 0;", "const int64_t first = upper ? std::min(i + 1, n) : 0;"),
    ],
)  # fmt: skip

GRAM_SCHMIDT_NATIVE = [*_FORWARD, *_BACKWARD, *_STEP, *_DEFLATE, *_PANELS, *_TILES]
