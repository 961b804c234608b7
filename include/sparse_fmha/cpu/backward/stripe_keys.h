// Gradients of the keys of stripes: a range of keys owns its sums, to which every group of queries
// adds for the keys that it lists.
#pragma once

#include "sparse_fmha/cpu/backward/keys.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

template <class Element>
class KeyGradients<Stripe, Element> : KeyLanes<Stripe, Element> {
  using Base = KeyLanes<Stripe, Element>;
  using Base::key_sums_, Base::value_sums_, Base::panel_dim_, Base::capacity_, Base::dim_;
  using Base::params_, Base::problem_, Base::plan_, Base::num_keys_, Base::tokens_;
  using typename Base::T;

 public:
  static size_t scratch_bytes(FmhaProblem const& problem, BackwardPlan const& plan) {
    Stripe::Params const params{};
    Buffers buffers(nullptr);
    KeyGradients(problem, params, plan).place_all(buffers);
    return buffers.used();
  }
  static void run(FmhaProblem const& problem, void const* params, BackwardPlan const& plan,
                  int64_t item, void* scratch) {
    Buffers buffers(scratch);
    KeyGradients gradients(problem, *static_cast<Stripe::Params const*>(params), plan);
    gradients.place_all(buffers);
    gradients.keys(item);
  }

 private:
  KeyGradients(FmhaProblem const& problem, Stripe::Params const& params, BackwardPlan const& plan)
      : Base(problem, params, plan), run_keys_(plan.run_keys) {}

  void place_all(Buffers& buffers) {
    this->place(buffers);
    buffers.take(run_key_sums_, int64_t{run_keys_} * dim_);
    buffers.take(run_value_sums_, int64_t{run_keys_} * dim_);
    if (problem_.key_bias.data != nullptr) {
      buffers.take(run_bias_sums_, run_keys_);
    }
  }

  void keys(int64_t item) {
    auto const batch = static_cast<int32_t>(item / plan_.key_tiles / problem_.heads_kv);
    auto const head_kv = static_cast<int32_t>(item / plan_.key_tiles % problem_.heads_kv);
    begin_ = static_cast<int32_t>(item % plan_.key_tiles) * run_keys_;
    end_ = min_int(begin_ + run_keys_, params_.len_kv);
    std::memset(run_key_sums_, 0, sizeof(T) * run_keys_ * dim_);
    std::memset(run_value_sums_, 0, sizeof(T) * run_keys_ * dim_);
    this->for_each_head(batch, head_kv, [&] {
      if (this->sums_biases()) {
        std::memset(run_bias_sums_, 0, sizeof(T) * run_keys_);
      }
      for (int32_t group = 0; group < ceil_div(params_.len_q, params_.block_q); ++group) {
        visit_group(group);
      }
      for (int32_t key = begin_; this->sums_biases() && key < end_; ++key) {
        this->bias_gradient()[key] = static_cast<float>(run_bias_sums_[key - begin_]);
      }
    });
    for (int32_t key = begin_; key < end_; ++key) {
      int64_t const row = int64_t{key - begin_} * dim_;
      Coord const token{0, 0, key};
      this->store(problem_.gradients->k, token, head_kv, run_key_sums_ + row,
                  static_cast<T>(problem_.scale));
      this->store(problem_.gradients->v, token, head_kv, run_value_sums_ + row, T(1));
    }
  }

  // The keys of this range that a group lists, in the order of the lists.
  void visit_group(int32_t group) {
    auto const& ranges = params_.ranges;
    for (int32_t i = 0; i < BlockSparse::count(ranges, group); ++i) {
      int32_t const start = ranges.indices[int64_t{group} * ranges.width + i];
      if (start < 0 || start >= end_) {
        continue;
      }
      for (int32_t key = max_int(start, begin_); key < min_int(start + params_.range_size, end_);
           ++key) {
        take(group, key);
      }
    }
    auto const& columns = params_.columns;
    for (int32_t i = 0; i < BlockSparse::count(columns, group); ++i) {
      int32_t const key = columns.indices[int64_t{group} * columns.width + i];
      if (key >= begin_ && key < end_) {
        take(group, key);
      }
    }
    visit_taken(group);
  }

  void take(int32_t group, int32_t key) {
    Coord const token{0, 0, key};
    this->load_key(token, token, this->row_of(problem_.k, token, this->head_kv()),
                   this->row_of(problem_.v, token, this->head_kv()));
    last_ = max_int(last_, key);
    if (num_keys_ == capacity_) {
      visit_taken(group);
    }
  }

  void visit_taken(int32_t group) {
    if (num_keys_ == 0) {
      return;
    }
    this->end_of_keys();
    if (this->has_bias()) {
      this->load_biases(/*extra=*/false);
    }
    int32_t const first = group * params_.block_q;
    for (int32_t q = first; q < first + params_.block_q; q += plan_.by_key.q[2]) {
      this->visit({{0, 0, 0}, {0, 0, q}}, last_ >= Stripe::limit(params_, q));
    }
    for (int lane = 0; lane < num_keys_; ++lane) {
      int64_t const from = static_cast<int64_t>(lane) * panel_dim_;
      int64_t const to = int64_t{tokens_[lane][2] - begin_} * dim_;
      for (int d = 0; d < dim_; ++d) {
        run_key_sums_[to + d] += key_sums_[from + d];
        run_value_sums_[to + d] += value_sums_[from + d];
      }
      if (this->sums_biases()) {
        run_bias_sums_[tokens_[lane][2] - begin_] += this->bias_sums_[lane];
      }
    }
    this->clear();
    last_ = 0;
  }

  int32_t const run_keys_;
  int32_t begin_ = 0;
  int32_t end_ = 0;
  int32_t last_ = 0;  // of the keys taken
  T* run_key_sums_;   // [key][dim]
  T* run_value_sums_;
  T* run_bias_sums_ = nullptr;  // of the selected head, if there are biases
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
