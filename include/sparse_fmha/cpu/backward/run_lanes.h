// Gradients of a run of keys: it owns their sums, to which every group of queries adds for the keys
// that it sees.
#pragma once

#include "sparse_fmha/cpu/backward/key_lanes.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// Keys are numbered: those of the grid, then the extra tokens.
template <class M, class Element>
class RunLanes : protected KeyLanes<M, Element> {
 protected:
  using Base = KeyLanes<M, Element>;
  using Base::key_sums_, Base::value_sums_, Base::keys_wide_, Base::values_wide_, Base::problem_;
  using Base::num_keys_, Base::plan_;
  using typename Base::T;
  using typename Base::Width;

  RunLanes(FmhaProblem const& problem, typename M::Params const& params, BackwardPlan const& plan)
      : Base(problem, params, plan), run_keys_(plan.run_keys), own_(volume(problem.grid_kv)) {}

  void place(Buffers& buffers) {
    Base::place(buffers);
    buffers.take(places_, this->capacity_);
    buffers.take(run_key_sums_, int64_t{run_keys_} * keys_wide_.dim);
    buffers.take(run_value_sums_, int64_t{run_keys_} * values_wide_.dim);
    if (problem_.key_bias.data != nullptr) {
      buffers.take(run_bias_sums_, run_keys_);
    }
  }

  // The sums of a run, item = (batch * heads_kv + head) * key tiles + run. visit_queries() adds for
  // the selected head.
  template <class VisitQueries>
  void sum_run(int64_t item, VisitQueries visit_queries) {
    auto const batch = static_cast<int32_t>(item / plan_.key_tiles / problem_.heads_kv);
    auto const head_kv = static_cast<int32_t>(item / plan_.key_tiles % problem_.heads_kv);
    begin_ = item % plan_.key_tiles * run_keys_;
    int64_t const all = own_ + problem_.extra_len;
    end_ = begin_ + run_keys_ < all ? begin_ + run_keys_ : all;
    std::memset(run_key_sums_, 0, sizeof(T) * run_keys_ * keys_wide_.dim);
    std::memset(run_value_sums_, 0, sizeof(T) * run_keys_ * values_wide_.dim);
    this->for_each_head(batch, head_kv, [&] {
      if (this->sums_biases()) {
        std::memset(run_bias_sums_, 0, sizeof(T) * run_keys_);
      }
      visit_queries();
      for (int64_t key = begin_; this->sums_biases() && key < end_ && key < own_; ++key) {
        this->bias_gradient()[key] = static_cast<float>(run_bias_sums_[key - begin_]);
      }
    });
    store_run(head_kv);
  }

  // Takes a key if it is in the run.
  void take(int64_t number, Coord const& token, Coord const& position, Element const* k,
            Element const* v) {
    if (number >= begin_ && number < end_) {
      places_[num_keys_] = static_cast<int32_t>(number - begin_);
      this->load_key(token, position, k, v);
    }
  }
  void end_of_taken(bool extra) {
    this->end_of_keys();
    if (this->has_bias()) {
      this->load_biases(extra);
    }
  }
  void add_taken() {
    for (int lane = 0; lane < num_keys_; ++lane) {
      add_row(keys_wide_, lane, key_sums_, run_key_sums_);
      add_row(values_wide_, lane, value_sums_, run_value_sums_);
      if (this->sums_biases()) {
        run_bias_sums_[places_[lane]] += this->bias_sums_[lane];
      }
    }
    this->clear();
  }

  int64_t begin_ = 0;
  int64_t end_ = 0;

 private:
  void add_row(Width const& width, int lane, T const* sums, T* run_sums) const {
    T const* const from = sums + static_cast<int64_t>(lane) * width.panel;
    T* const to = run_sums + int64_t{places_[lane]} * width.dim;
    for (int d = 0; d < width.dim; ++d) {
      to[d] += from[d];
    }
  }

  void store_run(int32_t head_kv) {
    Gradients const& gradients = *problem_.gradients;
    Coord const& grid = problem_.grid_kv;
    for (int64_t key = begin_; key < end_; ++key) {
      bool const extra = key >= own_;
      int64_t const row = key - begin_;
      auto const index = static_cast<int32_t>(extra ? key - own_ : key);
      Coord const token =
          extra ? Coord{0, 0, index}
                : Coord{index / grid[2] / grid[1], index / grid[2] % grid[1], index % grid[2]};
      this->store(keys_wide_, extra ? gradients.extra_k : gradients.k, token, head_kv,
                  run_key_sums_ + row * keys_wide_.dim, static_cast<T>(problem_.scale));
      this->store(values_wide_, extra ? gradients.extra_v : gradients.v, token, head_kv,
                  run_value_sums_ + row * values_wide_.dim, T(1));
    }
  }

  int32_t const run_keys_;
  int64_t const own_;  // keys of the grid
  int32_t* places_;    // of the taken keys in the run
  T* run_key_sums_;    // [key][dim]
  T* run_value_sums_;
  T* run_bias_sums_ = nullptr;  // of the selected head, if there are biases
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
