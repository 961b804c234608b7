// Gradients of the keys of stripes.
#pragma once

#include "sparse_fmha/cpu/backward/keys.h"
#include "sparse_fmha/cpu/backward/run_lanes.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

template <class Element>
class KeyGradients<Stripe, Element> : RunLanes<Stripe, Element> {
  using Base = RunLanes<Stripe, Element>;
  using Base::begin_, Base::end_, Base::capacity_, Base::num_keys_;
  using Base::params_, Base::problem_, Base::plan_;

 public:
  static size_t scratch_bytes(FmhaProblem const& problem, BackwardPlan const& plan) {
    Stripe::Params const params{};
    Buffers buffers(nullptr);
    KeyGradients(problem, params, plan).place(buffers);
    return buffers.used();
  }
  static void run(FmhaProblem const& problem, void const* params, BackwardPlan const& plan,
                  int64_t item, void* scratch) {
    Buffers buffers(scratch);
    KeyGradients gradients(problem, *static_cast<Stripe::Params const*>(params), plan);
    gradients.place(buffers);
    gradients.sum_run(item, [&] {
      Stripe::Params const& own = gradients.params_;
      for (int32_t group = 0; group < ceil_div(own.len_q, own.block_q); ++group) {
        gradients.visit_group(group);
      }
    });
  }

 private:
  KeyGradients(FmhaProblem const& problem, Stripe::Params const& params, BackwardPlan const& plan)
      : Base(problem, params, plan) {}

  // The keys of this run that a group lists, in the order of the lists.
  void visit_group(int32_t group) {
    auto const& ranges = params_.ranges;
    for (int32_t i = 0; i < BlockSparse::count(ranges, group); ++i) {
      int32_t const start = ranges.indices[int64_t{group} * ranges.width + i];
      if (start < 0 || start >= end_) {
        continue;
      }
      auto const begin = max_int(start, static_cast<int32_t>(begin_));
      auto const end = min_int(start + params_.range_size, static_cast<int32_t>(end_));
      for (int32_t key = begin; key < end; ++key) {
        take_key(group, key);
      }
    }
    auto const& columns = params_.columns;
    for (int32_t i = 0; i < BlockSparse::count(columns, group); ++i) {
      int32_t const key = columns.indices[int64_t{group} * columns.width + i];
      if (key >= begin_ && key < end_) {
        take_key(group, key);
      }
    }
    visit_taken(group);
  }

  void take_key(int32_t group, int32_t key) {
    Coord const token{0, 0, key};
    this->take(key, token, token, this->row_of(problem_.k, token, this->head_kv()),
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
    this->end_of_taken(/*extra=*/false);
    int32_t const first = group * params_.block_q;
    for (int32_t q = first; q < first + params_.block_q; q += plan_.by_key.q[2]) {
      this->visit({{0, 0, 0}, {0, 0, q}}, last_ >= Stripe::limit(params_, q));
    }
    this->add_taken();
    last_ = 0;
  }

  int32_t last_ = 0;  // of the keys taken
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
