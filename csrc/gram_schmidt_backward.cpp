// Backward of Gram-Schmidt on the CPU: products of the tall matrices while they lie in the caches, what is r×r in fp64,
// and their combinations; see clora_kernels/kernels/gram_schmidt/algebra.py for the formulas and the letters.
#include <torch/csrc/stable/library.h>

#include "gram_schmidt_blocks.h"
#include "threads.h"

namespace clora_kernels {
namespace {

// out [m, p] = sign · a [m, n] · b [n, p], or added to it; rows are padded to kPad.
CLORA_CLONES void multiply(int64_t m, int64_t n, int64_t p, const double* a, int64_t lda, const double* b, int64_t ldb,
                           double* out, int64_t ldo, Shape shape) {
  outer_panels<double>(m, a, lda, n, b, ldb, p, out, ldo, shape, true);
}

CLORA_CLONES void inverse(int64_t r, int64_t ld, const double* R, double* X, double* scratch) {
  invert(r, ld, R, X, scratch);
}

// A small matrix in fp64, zeros beyond its rows and columns.
struct Small {
  int64_t rows, columns, ld;
  std::vector<double> data;

  Small(int64_t m, int64_t n) : rows(m), columns(n), ld(padded(n)), data(static_cast<size_t>(padded(m) * padded(n))) {}
  void clear() { std::fill(data.begin(), data.end(), 0.0); }
  double& operator()(int64_t i, int64_t j) { return data[static_cast<size_t>(i * ld + j)]; }
  double operator()(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * ld + j)]; }

  Small transposed() const {
    Small t(columns, rows);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) t(j, i) = (*this)(i, j);
    }
    return t;
  }
  Small negative() const {
    Small t = *this;
    for (double& value : t.data) value = -value;
    return t;
  }
  std::vector<float> rounded() const { return {data.begin(), data.end()}; }
};

Small operator*(const Small& a, const Small& b) {
  Small out(a.rows, b.columns);
  multiply(a.rows, a.columns, b.columns, a.data.data(), a.ld, b.data.data(), b.ld, out.data.data(), out.ld,
           Shape::kFull);
  return out;
}

Small operator+(Small a, const Small& b) {
  for (size_t i = 0; i < a.data.size(); ++i) a.data[i] += b.data[i];
  return a;
}

// One matrix: what comes, and where gradients go; dV or dP without data is not wanted.
struct Problem {
  Tall dQ, Q, V, P;
  const float *R, *dR;
  Tall dV, dP;
};

// Tall·small, summed over terms.
struct Term {
  const Tall* tall;
  std::vector<float> small;
  Shape shape;
};

// The buffers of one thread for matrices of one shape.
template <typename Layout>
class Differentiator {
 public:
  Differentiator(int64_t d, int64_t r, int64_t k)
      : d_(d), r_(r), k_(k), layout_(2 * r + k), splits_(splits_of(d)), R_(r, r), Rt_(r, r), dR_(r, r), X_(r, r),
        U_(r, r), Y_(r, r), Z_(r, r), scratch_(static_cast<size_t>(kSmallBlock * padded(r))) {}

  void run(const Problem& p) {
    std::vector<bool> kept(static_cast<size_t>(r_));
    for (int64_t j = 0; j < r_; ++j) kept[static_cast<size_t>(j)] = p.R[j * r_ + j] != 0;
    const bool deficient = std::find(kept.begin(), kept.end(), false) != kept.end();
    const bool need_P = k_ && p.dP.data;
    const Small QdQ = inner(p.Q, p.dQ, !deficient);
    Small N(deficient ? r_ : 0, r_);
    solve(p, kept, QdQ, deficient ? inner(p.Q, p.V, false) : Small(0, r_), deficient, N);
    std::vector<Term> terms{{&p.dQ, Y_.rounded(), Shape::kLower}, {&p.Q, Z_.rounded(), Shape::kFull}};
    if (deficient) terms.push_back({&p.V, N.rounded(), Shape::kFull});
    if (k_) {
      const Small A = inner(p.P, p.dQ, false) * Y_;  // PᵀD₀: P is orthogonal to Q and to V′
      const Small S = need_P || deficient ? inner(p.P, p.V, false) : Small(k_, r_);
      const Small inside = deficient ? S * N : Small(k_, r_);
      terms.push_back({&p.P, (inside + A).negative().rounded(), Shape::kFull});
      if (need_P) {
        const Small T = S.transposed();
        const Small of_V = deficient ? N * T + A.transposed() : A.transposed();
        combine({{&p.dQ, (Y_ * T).negative().rounded(), Shape::kFull},
                 {&p.Q, (Z_ * T).negative().rounded(), Shape::kFull},
                 {&p.V, of_V.negative().rounded(), Shape::kFull},
                 {&p.P, (inside * T).rounded(), Shape::kFull}},
                p.dP);
      }
    }
    if (p.dV.data) combine(terms, p.dV);
  }

 private:
  int64_t grain(int64_t columns) const {
    return clora_kernels::grain(2 * kSplitRows * columns * r_);
  }

  // aᵀ·b in fp64 from fp32 sums; with `upper` its upper triangle alone.
  Small inner(const Tall& a, const Tall& b, bool upper) const {
    const int64_t na = a.columns, nb = b.columns;
    std::vector<Small> parts(static_cast<size_t>(splits_ - 1), Small(na, nb));
    Small total(na, nb);
    torch::stable::parallel_for(0, splits_, grain(na), [&](int64_t begin, int64_t end) {
      std::vector<float> sums(static_cast<size_t>(layout_.floats_of_sums(na, nb)));
      std::vector<float> left(static_cast<size_t>(layout_.floats(na))), right(static_cast<size_t>(layout_.floats(nb)));
      for (int64_t split = begin; split < end; ++split) {
        Small& out = split ? parts[static_cast<size_t>(split - 1)] : total;
        const auto gather = [&] { layout_.gather(na, nb, sums.data(), out.data.data(), out.ld, upper); };
        each_block(d_, split, layout_.rows, [&](int64_t row, int64_t n) {
          const Panel of_a = layout_.read(a, row, n, left.data()), of_b = layout_.read(b, row, n, right.data());
          layout_.inner(n, of_a, na, of_b, nb, sums.data(), upper);
          if ((row + n) % layout_.rows_of_sums() == 0) gather();
        });
        gather();
      }
    });
    for (const Small& part : parts) {
      for (size_t i = 0; i < total.data.size(); ++i) total.data[i] += part.data[i];
    }
    return total;
  }

  // D₀ = dQ·Y + Q·Z + V′·N; QV = QᵀV is read where columns are dependent.
  void solve(const Problem& p, const std::vector<bool>& kept, const Small& QdQ, const Small& QV, bool deficient,
             Small& N) {
    for (Small* m : {&R_, &Rt_, &dR_, &X_, &U_, &Z_}) m->clear();
    Small of_dropped(deficient ? r_ : 0, r_);
    for (int64_t i = 0; i < r_; ++i) {
      const bool is_kept = kept[static_cast<size_t>(i)];
      R_(i, i) = 1;
      for (int64_t j = i; is_kept && j < r_; ++j) {
        const bool both = kept[static_cast<size_t>(j)];
        if (both) R_(i, j) = Rt_(j, i) = static_cast<double>(p.R[i * r_ + j]);
        (both ? dR_ : of_dropped)(i, j) = static_cast<double>(p.dR[i * r_ + j]);
      }
    }
    inverse(r_, R_.ld, R_.data.data(), X_.data.data(), scratch_.data());
    // the lower triangle of M = R·dRᵀ − dQᵀ·Q, as the upper one of its transpose; then all of it, mirrored
    constexpr int64_t kStrip = 16;
    for (int64_t j = 0; j < r_; j += kStrip) {
      const int64_t columns = std::min(kStrip, r_ - j);
      multiply(j + columns, r_ - j, columns, &dR_(0, j), dR_.ld, &Rt_(j, j), Rt_.ld, &U_(0, j), U_.ld, Shape::kFull);
    }
    if (deficient) U_ = U_ + (QV * of_dropped.transposed()).negative();
    for (int64_t i = 0; i < r_; ++i) {
      for (int64_t j = i; j < r_; ++j) {
        const bool both = kept[static_cast<size_t>(i)] && kept[static_cast<size_t>(j)];
        U_(i, j) = U_(j, i) = both ? U_(i, j) - QdQ(i, j) : 0.0;
        Y_(j, i) = both ? X_(i, j) : 0.0;
      }
    }
    multiply(r_, r_, r_, U_.data.data(), U_.ld, Y_.data.data(), Y_.ld, Z_.data.data(), Z_.ld, Shape::kLower);
    if (!deficient) return;
    Z_ = Z_ + of_dropped;
    N = of_dropped.transposed() * Y_;
  }

  // out = Σ tall·small.
  void combine(const std::vector<Term>& terms, const Tall& out) const {
    const int64_t nb = out.columns;
    int64_t columns = 0, most = 0;
    for (const Term& term : terms) {
      columns += term.tall->columns;
      most = std::max(most, term.tall->columns);
    }
    torch::stable::parallel_for(0, splits_, grain(columns), [&](int64_t begin, int64_t end) {
      std::vector<float> panel(static_cast<size_t>(layout_.floats(most))), sums(static_cast<size_t>(layout_.floats(nb)));
      for (int64_t split = begin; split < end; ++split) {
        each_block(d_, split, layout_.rows, [&](int64_t row, int64_t n) {
          const Panel sum = layout_.place(out, row, n, sums.data());
          bool add = false;
          for (const Term& term : terms) {
            const Panel of_term = layout_.read(*term.tall, row, n, panel.data());
            layout_.outer(n, of_term, term.tall->columns, term.small.data(), padded(nb), nb, sum, term.shape, add);
            add = true;
          }
          layout_.write(sum, out, row, n);
        });
      }
    });
  }

  int64_t d_, r_, k_;
  Layout layout_;
  int64_t splits_;
  Small R_, Rt_, dR_, X_, U_, Y_, Z_;  // Y_ is zero above its diagonal
  std::vector<double> scratch_;
};

void check(const std::vector<Tensor>& tensors, const std::vector<Tensor>& like, const char* name) {
  CLORA_CHECK(tensors.size() == like.size(), name, " must be a list of ", like.size(), ", got ", tensors.size());
  for (size_t i = 0; i < like.size(); ++i) {
    CLORA_CHECK(tensors[i].dim() == 3 && tensors[i].is_cpu(), name, " must have 3 dimensions and be on the CPU");
    CLORA_CHECK(tensors[i].size(0) == like[i].size(0), name, " must have the batch of V, ", like[i].size(0), ", got ",
                tensors[i].size(0));
    with_type(tensors[i], name, [](auto) {});
  }
}

void check_rows(const std::vector<Tensor>& tensors, const std::vector<Tensor>& V, const char* name, bool columns) {
  check(tensors, V, name);
  for (size_t i = 0; i < V.size(); ++i) {
    CLORA_CHECK(tensors[i].size(1) == V[i].size(1) && (!columns || tensors[i].size(2) == V[i].size(2)), name,
                " must have the size of V, ", V[i].size(1), " by ", V[i].size(2), ", got ", tensors[i].size(1), " by ",
                tensors[i].size(2));
  }
}

void check_small(const std::vector<Tensor>& tensors, const std::vector<Tensor>& V, const char* name) {
  check(tensors, V, name);
  for (size_t i = 0; i < V.size(); ++i) {
    CLORA_CHECK(tensors[i].size(1) == V[i].size(2) && tensors[i].size(2) == V[i].size(2), name, " must be ",
                V[i].size(2), " square, got ", tensors[i].size(1), " by ", tensors[i].size(2));
    CLORA_CHECK(tensors[i].scalar_type() == ScalarType::Float && tensors[i].is_contiguous(), name,
                " must be fp32 and contiguous");
  }
}

// For each V [B, d, r], and P [B, d, k] beside it or no P at all: all dV in the type and layout of V, then all dP in fp32;
// one that is not needed is empty.
std::vector<Tensor> gram_schmidt_gradients(const std::vector<Tensor>& dQ, const std::vector<Tensor>& dR,
                                           const std::vector<Tensor>& V, const std::vector<Tensor>& P,
                                           const std::vector<Tensor>& Q, const std::vector<Tensor>& R, bool need_V,
                                           bool need_P) {
  check_rows(V, V, "V", true);
  check_rows(dQ, V, "dQ", true);
  check_rows(Q, V, "Q", true);
  if (!P.empty()) check_rows(P, V, "P", false);
  check_small(dR, V, "dR");
  check_small(R, V, "R");
  std::vector<Tensor> dV, dP;
  std::vector<int64_t> first{0};  // the place of each list entry's first matrix among all matrices
  for (const Tensor& t : V) {
    dV.push_back(need_V ? torch::stable::empty_like(t) : torch::stable::new_empty(t, {0}));
    first.push_back(first.back() + t.size(0));
  }
  for (const Tensor& t : P) {
    const std::vector<int64_t> size{t.size(0), t.size(1), t.size(2)};
    dP.push_back(torch::stable::new_empty(t, need_P ? size : std::vector<int64_t>{0}, ScalarType::Float));
  }
  torch::stable::parallel_for(0, first.back(), 1, [&](int64_t begin, int64_t end) {
    size_t i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (int64_t at = begin; at < end; ++i) {
      const int64_t d = V[i].size(1), r = V[i].size(2), k = P.empty() ? 0 : P[i].size(2);
      const int64_t last = std::min(end, first[i + 1]);
      const auto run_all = [&](auto differentiator) {
        for (; at < last; ++at) {
          const int64_t b = at - first[i];
          const float* R_b = R[i].const_data_ptr<float>() + b * r * r;
          const float* dR_b = dR[i].const_data_ptr<float>() + b * r * r;
          differentiator.run({tall(dQ[i], b), tall(Q[i], b), tall(V[i], b), k ? tall(P[i], b) : Tall{}, R_b, dR_b,
                              need_V ? tall(dV[i], b) : Tall{}, need_P && k ? tall(dP[i], b) : Tall{}});
        }
      };
      if (is_by_columns(V[i], k)) {
        run_all(Differentiator<ByColumns>(d, r, k));
      } else {
        run_all(Differentiator<ByRows>(d, r, k));
      }
    }
  });
  dV.insert(dV.end(), dP.begin(), dP.end());
  return dV;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clora_kernels, CPU, m) {
  m.impl("gram_schmidt_gradients", TORCH_BOX(&gram_schmidt_gradients));
}

}  // namespace clora_kernels
