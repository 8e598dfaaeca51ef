// Gram-Schmidt on the CPU: sweeps of Cholesky-QR while a matrix lies in the caches, once or twice, and column by column
// in fp64 where it must be; see clora_kernels/kernels/gram_schmidt/algebra.py for the algorithm.
//
// Every sum has one order, that of (d, r, k) alone: a matrix' bits depend neither on its batch nor on the threads.
#include <torch/csrc/stable/library.h>

#include <limits>

#include "gram_schmidt_blocks.h"
#include "threads.h"

namespace clora_kernels {
namespace {

constexpr int64_t kKeptFloats = 1 << 17;  // panels of a matrix that may be kept from sums to application

CLORA_CLONES State step(int64_t k, int64_t r, int64_t ld, double* S, double* G, double rank_tol, double* scratch,
                        float* x, float* t) {
  return find_step(k, r, ld, S, G, rank_tol, scratch, x, t);
}

CLORA_CLONES int64_t deflated(int64_t d, int64_t m, int64_t r, double* W, int64_t ld, double rank_tol, double* R,
                              int64_t ldr, double* group, double* C) {
  return deflate_columns(d, m, r, W, ld, rank_tol, R, ldr, group, C);
}

CLORA_CLONES void product(int64_t r, int64_t ld, const double* left, const double* right, double* out, double* scratch) {
  multiply(r, r, left, ld, right, ld, 1.0, true, out, scratch);
}

// All of a matrix in fp64; whether every element is finite.
template <typename T>
CLORA_INLINE bool widen_all(const Matrix<T>& m, double* out, int64_t ld) {
  double finite = 0;
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.columns; ++j) {
      const double value = T::from(m.data[i * m.row_stride + j * m.column_stride]);
      out[i * ld + j] = value;
      finite += value - value;  // NaN for Inf and NaN
    }
  }
  return finite == 0;
}

template <typename T>
CLORA_INLINE void narrow_all(const double* from, int64_t ld, const Matrix<T>& m) {
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.columns; ++j) {
      m.data[i * m.row_stride + j * m.column_stride] = T::to(static_cast<float>(from[i * ld + j]));
    }
  }
}

#define CLORA_DOUBLE(Type)                                                                                          \
  CLORA_CLONES bool read_double(const Matrix<Type>& m, double* out, int64_t ld) { return widen_all(m, out, ld); } \
  CLORA_CLONES void write_double(const double* from, int64_t ld, const Matrix<Type>& m) { narrow_all(from, ld, m); }

CLORA_DOUBLE(Float32)
CLORA_DOUBLE(BFloat16)
CLORA_DOUBLE(Float16)

#undef CLORA_DOUBLE

// One matrix V [d, r] beside P [d, k], and where its results go.
struct Problem {
  Tall V, P, Q;
  float* R;
  int32_t* rank;
};

// The buffers of one thread for matrices of one shape.
template <typename Layout>
class Orthonormaliser {
 public:
  Orthonormaliser(int64_t d, int64_t r, int64_t k, double rank_tol, const Tensor& like)
      : d_(d), r_(r), k_(k), ld_(padded(r)), rank_tol_(rank_tol), layout_(r + k), splits_(splits_of(d)), like_(like) {
    block_ = layout_.floats(r) + layout_.floats(k);
    const int64_t blocks = (d + layout_.rows - 1) / layout_.rows;
    keeps_ = blocks * block_ <= kKeptFloats;
    kept_.resize(static_cast<size_t>(keeps_ ? blocks * block_ : 0));
    products_.resize(static_cast<size_t>(splits_ * (r + k) * ld_));
    scratch_.resize(static_cast<size_t>((r + k + 4 + kSmallBlock) * ld_));
    for (Sweep& sweep : sweeps_) {
      sweep.X.resize(static_cast<size_t>(padded(r) * ld_));
      sweep.T.resize(static_cast<size_t>(padded(k) * ld_));
      sweep.R.resize(static_cast<size_t>(padded(r) * ld_));  // tiles of the Cholesky end beyond its last row
    }
  }

  void run(const Problem& p) {
    is_read_ = false;
    int64_t sweeps = 0;
    State state = kAgain;
    while (state == kAgain && sweeps < 2) state = sweep(p, sweeps++);
    if (state != kDone) return deflate(p);
    apply(p, sweeps);
    write_R(p, sweeps);
    *p.rank = static_cast<int32_t>(r_);
  }

 private:
  // Calls body(first row, rows, panel of V after `sweeps` sweeps, panel of P) for the blocks of a split; the panel is made
  // in its place in `target`, if there is one.
  template <typename Body>
  void each_panel(const Problem& p, int64_t split, int64_t sweeps, const Tall* target, Body body) {
    std::vector<float> own(static_cast<size_t>(keeps_ ? 0 : block_)), swept[2];
    for (int64_t s = 0; s < sweeps; ++s) swept[s].resize(static_cast<size_t>(layout_.floats(r_)));
    each_block(d_, split, layout_.rows, [&](int64_t row, int64_t n) {
      float* buffer = keeps_ ? kept_.data() + row / layout_.rows * block_ : own.data();
      float* of_basis = buffer + layout_.floats(r_);
      const bool is_there = keeps_ && is_read_;
      Panel v = is_there ? layout_.place(p.V, row, n, buffer) : layout_.read(p.V, row, n, buffer);
      const Panel basis = is_there || !k_ ? layout_.place(p.P, row, n, of_basis) : layout_.read(p.P, row, n, of_basis);
      for (int64_t s = 0; s < sweeps; ++s) {
        float* next = swept[s].data();
        const Panel to = target && s + 1 == sweeps ? layout_.place(*target, row, n, next) : layout_.panel(r_, next);
        layout_.outer(n, v, r_, sweeps_[s].X.data(), ld_, r_, to, Shape::kUpper, false);
        if (k_) layout_.outer(n, basis, k_, sweeps_[s].T.data(), ld_, r_, to, Shape::kFull, true);
        v = to;
      }
      body(row, n, v, basis);
    });
  }

  int64_t grain() const {
    return clora_kernels::grain(kSplitRows * r_ * (r_ + 2 * k_));
  }

  // One more sweep after `sweeps`: G = WᵀW and S = PᵀW, fp32 sums over pieces and fp64 sums of them, and the step.
  State sweep(const Problem& p, int64_t sweeps) {
    const int64_t size = (r_ + k_) * ld_;
    std::fill(products_.begin(), products_.end(), 0.0);
    torch::stable::parallel_for(0, splits_, grain(), [&](int64_t begin, int64_t end) {
      std::vector<float> of_G(static_cast<size_t>(layout_.floats_of_sums(r_, r_)));
      std::vector<float> of_S(static_cast<size_t>(k_ ? layout_.floats_of_sums(k_, r_) : 0));
      for (int64_t split = begin; split < end; ++split) {
        double *G = products_.data() + split * size, *S = G + r_ * ld_;
        const auto gather = [&] {
          layout_.gather(r_, r_, of_G.data(), G, ld_, true);
          if (k_) layout_.gather(k_, r_, of_S.data(), S, ld_, false);
        };
        each_panel(p, split, sweeps, nullptr, [&](int64_t row, int64_t n, const Panel& v, const Panel& basis) {
          layout_.inner(n, v, r_, v, r_, of_G.data(), true);
          if (k_) layout_.inner(n, basis, k_, v, r_, of_S.data(), false);
          if ((row + n) % layout_.rows_of_sums() == 0) gather();
        });
        gather();
      }
    });
    is_read_ = true;
    for (int64_t split = 1; split < splits_; ++split) {
      for (int64_t i = 0; i < size; ++i) products_[static_cast<size_t>(i)] += products_[static_cast<size_t>(split * size + i)];
    }
    Sweep& found = sweeps_[sweeps];
    std::copy_n(products_.data(), r_ * ld_, found.R.data());
    return step(k_, r_, ld_, products_.data() + r_ * ld_, found.R.data(), rank_tol_, scratch_.data(), found.X.data(),
                found.T.data());
  }

  void apply(const Problem& p, int64_t sweeps) {
    torch::stable::parallel_for(0, splits_, grain(), [&](int64_t begin, int64_t end) {
      for (int64_t split = begin; split < end; ++split) {
        each_panel(p, split, sweeps, &p.Q,
                   [&](int64_t row, int64_t n, const Panel& q, const Panel&) { layout_.write(q, p.Q, row, n); });
      }
    });
  }

  void write_R(const Problem& p, int64_t sweeps) {
    const double* R = sweeps_[0].R.data();
    if (sweeps == 2) {
      std::fill_n(products_.data(), r_ * ld_, 0.0);
      product(r_, ld_, sweeps_[1].R.data(), R, products_.data(), scratch_.data());
      R = products_.data();
    }
    put_R(p, R);
  }

  void put_R(const Problem& p, const double* R) const {
    for (int64_t i = 0; i < r_; ++i) {
      for (int64_t j = 0; j < r_; ++j) p.R[i * r_ + j] = j < i ? 0.0f : static_cast<float>(R[i * ld_ + j]);
    }
  }

  void deflate(const Problem& p) {
    const int64_t m = padded(k_), ld = (m + padded(r_)) | kPad;  // rows that do not all share a few sets of a cache
    const Tensor buffer = torch::stable::new_empty(like_, {2 * (d_ * ld + kPad * d_ + ld * kPad)}, ScalarType::Float);
    auto* W = static_cast<double*>(buffer.data_ptr());
    double *group = W + d_ * ld, *C = group + kPad * d_;
    std::fill_n(W, d_ * ld, 0.0);
    bool finite = true;
    with_type(p.V.type, "V", [&](auto type) { finite &= read_double(p.V.as<decltype(type)>(), W + m, ld); });
    if (k_) {
      with_type(p.P.type, "P", [&](auto type) { finite &= read_double(p.P.as<decltype(type)>(), W, ld); });
    }
    if (finite) {
      double* R = products_.data();
      std::fill_n(R, r_ * ld_, 0.0);
      *p.rank = static_cast<int32_t>(deflated(d_, m, r_, W, ld, rank_tol_, R, ld_, group, C));
      put_R(p, R);
    } else {
      std::fill_n(W, d_ * ld, std::numeric_limits<double>::quiet_NaN());
      std::fill_n(p.R, r_ * r_, std::numeric_limits<float>::quiet_NaN());
      *p.rank = -1;
    }
    with_type(p.Q.type, "Q", [&](auto type) { write_double(W + m, ld, p.Q.as<decltype(type)>()); });
  }

  int64_t d_, r_, k_, ld_;
  double rank_tol_;
  Layout layout_;
  int64_t splits_, block_;
  const Tensor& like_;
  bool keeps_, is_read_ = false;
  std::vector<float> kept_;
  std::vector<double> products_, scratch_;
  Sweep sweeps_[2];
};

// A small matrix is on its way from memory while the one before it is worked on.
template <int kWrites>
void prefetch(const Tall& m) {
  constexpr int64_t kMostBytes = 48 << 10, kLine = 64;
  const int64_t bytes = m.rows * m.columns * (m.type == ScalarType::Float ? 4 : 2);
  const bool dense = (m.column_stride == 1 && m.row_stride == m.columns) ||
                     (m.row_stride == 1 && m.column_stride == m.rows);
  if (!dense || bytes > kMostBytes) return;
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(static_cast<const char*>(m.data) + at, kWrites);
}

void check(const Tensor& t, const char* name) {
  CLORA_CHECK(t.dim() == 3, name, " must have 3 dimensions, got ", t.dim());
  CLORA_CHECK(t.is_cpu(), name, " must be on the CPU");
  with_type(t, name, [](auto) {});
}

void check_basis(const Tensor& P, const Tensor& V) {
  check(P, "P");
  CLORA_CHECK(P.size(0) == V.size(0) && P.size(1) == V.size(1), "P must be ", V.size(0), " matrices of ", V.size(1),
              " rows, as V, got ", P.size(0), " of ", P.size(1));
}

// For each V [B, d, r], and P [B, d, k] beside it or no P at all: all Q, then all R, then all ranks.
std::vector<Tensor> gram_schmidt_sweeps(const std::vector<Tensor>& V, const std::vector<Tensor>& P, double rank_tol) {
  CLORA_CHECK(P.empty() || V.size() == P.size(), "P must be an empty list or one of ", V.size(), ", got ", P.size());
  std::vector<Tensor> Q, R, rank;
  std::vector<int64_t> first{0};  // the place of each list entry's first matrix among all matrices
  for (size_t i = 0; i < V.size(); ++i) {
    check(V[i], "V");
    if (!P.empty()) check_basis(P[i], V[i]);
    const int64_t B = V[i].size(0), r = V[i].size(2);
    Q.push_back(torch::stable::empty_like(V[i]));
    R.push_back(torch::stable::new_empty(V[i], {B, r, r}, ScalarType::Float));
    rank.push_back(torch::stable::new_empty(V[i], {B}, ScalarType::Int));
    first.push_back(first.back() + B);
  }
  torch::stable::parallel_for(0, first.back(), 1, [&](int64_t begin, int64_t end) {
    size_t i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (int64_t at = begin; at < end; ++i) {
      const int64_t d = V[i].size(1), r = V[i].size(2), k = P.empty() ? 0 : P[i].size(2);
      const int64_t last = std::min(end, first[i + 1]);
      if (at == last) continue;
      const auto run_all = [&](auto orthonormaliser) {
        for (; at < last; ++at) {
          const int64_t b = at - first[i];
          if (at + 1 < last) prefetch<0>(tall(V[i], b + 1)), prefetch<1>(tall(Q[i], b + 1));
          orthonormaliser.run({tall(V[i], b), k ? tall(P[i], b) : Tall{}, tall(Q[i], b),
                               R[i].mutable_data_ptr<float>() + b * r * r, rank[i].mutable_data_ptr<int32_t>() + b});
        }
      };
      if (is_by_columns(V[i], k)) {
        run_all(Orthonormaliser<ByColumns>(d, r, k, rank_tol, V[i]));
      } else {
        run_all(Orthonormaliser<ByRows>(d, r, k, rank_tol, V[i]));
      }
    }
  });
  Q.insert(Q.end(), R.begin(), R.end());
  Q.insert(Q.end(), rank.begin(), rank.end());
  return Q;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clora_kernels, CPU, m) { m.impl("gram_schmidt_sweeps", TORCH_BOX(&gram_schmidt_sweeps)); }

}  // namespace clora_kernels
