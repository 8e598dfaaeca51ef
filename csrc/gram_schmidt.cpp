// Gram-Schmidt on the CPU: sweeps of Cholesky-QR while a matrix lies in the caches, once or twice, and column by column
// in fp64 where it must be; see clora_kernels/kernels/gram_schmidt/algebra.py for the algorithm.
//
// Every sum has one order, that of (d, r, k) alone: a matrix' bits depend neither on its batch nor on the threads.
#include <torch/csrc/stable/library.h>

#include <limits>

#include "gram_schmidt_blocks.h"

namespace clora_kernels {
namespace {

constexpr int64_t kFlopsPerThread = 1 << 19;    // less than this is not worth a second thread
constexpr int64_t kKeptFloats = 1 << 17;        // panels of a matrix that may be kept from sums to application

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

// One matrix V [d, r] beside P [d, k], and where its results go.
struct Problem {
  Tall V, P, Q;
  float* R;
  int32_t* rank;
};

// The buffers of one thread for matrices of one shape.
class Orthonormaliser {
 public:
  Orthonormaliser(int64_t d, int64_t r, int64_t k, double rank_tol, const Tensor& like)
      : d_(d), r_(r), k_(k), ld_(padded(r)), ldr_(panel_ld(r)), ldk_(k ? panel_ld(k) : 0), rank_tol_(rank_tol),
        blocks_(d, ldr_ + ldk_), like_(like), keeps_(d * (ldr_ + ldk_) <= kKeptFloats) {
    sums_.resize(static_cast<size_t>(blocks_.splits * sums_size()));
    S_.resize(static_cast<size_t>(k * ld_));
    G_.resize(static_cast<size_t>(r * ld_));
    scratch_.resize(static_cast<size_t>((r + k + 4) * ld_));
    if (keeps_) kept_.resize(static_cast<size_t>((d_ + kPad) * (ldr_ + ldk_)));
  }

  void run(const Problem& p) {
    kept_is_read_ = false;
    add_products(p, 0);
    Sweep& first = sweeps_[0];
    find(first);
    int64_t sweeps = 1;
    State state = first.state;
    if (state == kAgain) {
      add_products(p, 1);
      find(sweeps_[1]);
      sweeps = 2;
      state = sweeps_[1].state;  // orthonormal to 1 %: a third sweep is never wanted
    }
    if (state != kDone) return deflate(p);
    apply(p, sweeps);
    write_R(p, sweeps);
    *p.rank = static_cast<int32_t>(r_);
  }

 private:
  int64_t sums_size() const { return (padded(r_) + padded(k_)) * ldr_; }

  // Calls body(first row, rows, panel of V after `sweeps` sweeps, panel of P) for the blocks of a split.
  template <typename Body>
  void each_panel(const Problem& p, int64_t split, int64_t sweeps, Body body) {
    const auto size = static_cast<size_t>(blocks_.rows * ldr_);
    std::vector<float> own(keeps_ ? 0 : size + static_cast<size_t>(blocks_.rows * ldk_)), swept[2];
    for (int64_t s = 0; s < sweeps; ++s) swept[s].resize(size);
    blocks_.each(split, [&](int64_t row, int64_t rows) {
      float* v = keeps_ ? kept_.data() + row * (ldr_ + ldk_) : own.data();
      float* basis = v + (keeps_ ? padded(rows) : blocks_.rows) * ldr_;
      if (!keeps_ || !kept_is_read_) {
        read(p.V, row, rows, v, ldr_);
        if (k_) read(p.P, row, rows, basis, ldk_);
      }
      for (int64_t s = 0; s < sweeps; ++s) {
        float* to = swept[s].data();
        outer(rows, v, ldr_, r_, sweeps_[s].X.data(), ld_, r_, to, ldr_, true, false);
        if (k_) outer(rows, basis, ldk_, k_, sweeps_[s].T.data(), ld_, r_, to, ldr_, false, true);
        v = to;
      }
      body(row, rows, v, basis);
    });
  }

  int64_t grain() const {
    return std::max<int64_t>(1, kFlopsPerThread / std::max<int64_t>(kSplitRows * r_ * (r_ + 2 * k_), 1));
  }

  // S = PᵀW and G = WᵀW of the columns after `sweeps` sweeps, in fp64 from fp32 sums over splits.
  void add_products(const Problem& p, int64_t sweeps) {
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    torch::stable::parallel_for(0, blocks_.splits, grain(), [&](int64_t begin, int64_t end) {
      for (int64_t split = begin; split < end; ++split) {
        float* G = sums_.data() + split * sums_size();
        float* S = G + padded(r_) * ldr_;
        each_panel(p, split, sweeps, [&](int64_t, int64_t rows, const float* v, const float* basis) {
          inner(rows, v, ldr_, r_, v, ldr_, r_, G, ldr_, true);
          if (k_) inner(rows, basis, ldk_, k_, v, ldr_, r_, S, ldr_, false);
        });
      }
    });
    kept_is_read_ = true;
    std::fill(G_.begin(), G_.end(), 0.0);
    std::fill(S_.begin(), S_.end(), 0.0);
    for (int64_t split = 0; split < blocks_.splits; ++split) {
      const float* G = sums_.data() + split * sums_size();
      const float* S = G + padded(r_) * ldr_;
      for (int64_t i = 0; i < r_; ++i) {
        for (int64_t j = i; j < r_; ++j) G_[static_cast<size_t>(i * ld_ + j)] += static_cast<double>(G[i * ldr_ + j]);
      }
      for (int64_t i = 0; i < k_; ++i) {
        for (int64_t j = 0; j < r_; ++j) S_[static_cast<size_t>(i * ld_ + j)] += static_cast<double>(S[i * ldr_ + j]);
      }
    }
  }

  void find(Sweep& sweep) {
    sweep.X.resize(static_cast<size_t>(padded(r_) * ld_));
    sweep.T.resize(static_cast<size_t>(padded(k_) * ld_));
    sweep.state = step(k_, r_, ld_, S_.data(), G_.data(), rank_tol_, scratch_.data(), sweep.X.data(), sweep.T.data());
    sweep.R.swap(G_);
    G_.resize(sweep.R.size());
  }

  void apply(const Problem& p, int64_t sweeps) {
    torch::stable::parallel_for(0, blocks_.splits, grain(), [&](int64_t begin, int64_t end) {
      for (int64_t split = begin; split < end; ++split) {
        each_panel(p, split, sweeps, [&](int64_t row, int64_t rows, const float* q, const float*) {
          write(q, ldr_, p.Q, row, rows);
        });
      }
    });
  }

  void write_R(const Problem& p, int64_t sweeps) {
    const double* R = sweeps_[0].R.data();
    if (sweeps == 2) {
      std::fill(G_.begin(), G_.end(), 0.0);
      product(r_, ld_, sweeps_[1].R.data(), R, G_.data(), scratch_.data());
      R = G_.data();
    }
    put_R(p, R);
  }

  void put_R(const Problem& p, const double* R) const {
    for (int64_t i = 0; i < r_; ++i) {
      for (int64_t j = 0; j < r_; ++j) p.R[i * r_ + j] = j < i ? 0.0f : static_cast<float>(R[i * ld_ + j]);
    }
  }

  void deflate(const Problem& p) {
    const int64_t m = padded(k_), ld = m + padded(r_);
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
      std::fill(G_.begin(), G_.end(), 0.0);
      *p.rank = static_cast<int32_t>(deflated(d_, m, r_, W, ld, rank_tol_, G_.data(), ld_, group, C));
      put_R(p, G_.data());
    } else {
      std::fill_n(W, d_ * ld, std::numeric_limits<double>::quiet_NaN());
      std::fill_n(p.R, r_ * r_, std::numeric_limits<float>::quiet_NaN());
      *p.rank = -1;
    }
    with_type(p.Q.type, "Q", [&](auto type) { write_double(W + m, ld, p.Q.as<decltype(type)>()); });
  }

  int64_t d_, r_, k_, ld_, ldr_, ldk_;
  double rank_tol_;
  Blocks blocks_;
  const Tensor& like_;
  bool keeps_, kept_is_read_ = false;
  std::vector<float> sums_, kept_;
  std::vector<double> S_, G_, scratch_;
  Sweep sweeps_[2];
};

void check(const Tensor& V, const Tensor& P) {
  STD_TORCH_CHECK(V.dim() == 3 && P.dim() == 3, "V and P must have 3 dimensions, got ", V.dim(), " and ", P.dim());
  STD_TORCH_CHECK(V.is_cpu() && P.is_cpu(), "V and P must be on the CPU");
  STD_TORCH_CHECK(P.size(0) == V.size(0) && P.size(1) == V.size(1), "P must be ", V.size(0), " matrices of ", V.size(1),
                  " rows, as V, got ", P.size(0), " of ", P.size(1));
}

// For each V [B, d, r] and P [B, d, k], k = 0 for none: all Q, then all R, then all ranks.
std::vector<Tensor> gram_schmidt_sweeps(const std::vector<Tensor>& V, const std::vector<Tensor>& P, double rank_tol) {
  STD_TORCH_CHECK(V.size() == P.size(), "V and P must be lists of one length, got ", V.size(), " and ", P.size());
  std::vector<Tensor> Q, R, rank;
  std::vector<int64_t> first{0};  // the place of each list entry's first matrix among all matrices
  for (size_t i = 0; i < V.size(); ++i) {
    check(V[i], P[i]);
    with_type(V[i], "V", [](auto) {});
    with_type(P[i], "P", [](auto) {});
    const int64_t B = V[i].size(0), r = V[i].size(2);
    Q.push_back(torch::stable::empty_like(V[i]));
    R.push_back(torch::stable::new_empty(V[i], {B, r, r}, ScalarType::Float));
    rank.push_back(torch::stable::new_empty(V[i], {B}, ScalarType::Int));
    first.push_back(first.back() + B);
  }
  torch::stable::parallel_for(0, first.back(), 1, [&](int64_t begin, int64_t end) {
    size_t i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (int64_t at = begin; at < end; ++i) {
      const int64_t d = V[i].size(1), r = V[i].size(2), last = std::min(end, first[i + 1]);
      if (at == last) continue;
      Orthonormaliser orthonormaliser(d, r, P[i].size(2), rank_tol, V[i]);
      for (; at < last; ++at) {
        const int64_t b = at - first[i];
        orthonormaliser.run({tall(V[i], b), tall(P[i], b), tall(Q[i], b), R[i].mutable_data_ptr<float>() + b * r * r,
                             rank[i].mutable_data_ptr<int32_t>() + b});
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
