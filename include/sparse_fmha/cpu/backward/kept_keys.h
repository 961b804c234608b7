// Gradients of keys where tiles are skipped: every group of rows passes by in its own order, with
// the tiles that it kept.
#pragma once

#include "sparse_fmha/cpu/backward/run_lanes.h"
#include "sparse_fmha/cpu/group_vote.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

template <class M, class Element>
class KeptKeyGradients : RunLanes<M, Element> {
  using Base = RunLanes<M, Element>;
  using Base::problem_, Base::params_, Base::plan_, Base::num_keys_, Base::batch_, Base::head_;

 public:
  static size_t scratch_bytes(FmhaProblem const& problem, BackwardPlan const& plan) {
    typename M::Params const params{};
    Buffers buffers(nullptr);
    KeptKeyGradients(problem, params, plan).place_all(buffers);
    return buffers.used();
  }
  static void run(FmhaProblem const& problem, void const* params, BackwardPlan const& plan,
                  int64_t item, void* scratch) {
    Buffers buffers(scratch);
    KeptKeyGradients gradients(problem, *static_cast<typename M::Params const*>(params), plan);
    gradients.place_all(buffers);
    gradients.sum_run(item, [&] {
      for (int32_t group = 0; group < plan.query_tiles; ++group) {
        gradients.visit_group(group);
      }
    });
  }

 private:
  KeptKeyGradients(FmhaProblem const& problem, typename M::Params const& params,
                   BackwardPlan const& plan)
      : Base(problem, params, plan) {}

  void place_all(Buffers& buffers) {
    this->place(buffers);
    buffers.take(group_scratch_, Group<M>::scratch_words(problem_));
  }

  void visit_group(int32_t index) {
    Group<M> const group(params_, plan_.by_query, index, group_scratch_);
    int64_t const head = int64_t{batch_} * problem_.heads_q + head_;
    uint8_t const* skipped = plan_.skipped.of(head * plan_.query_tiles + index);
    bool extra = false;
    walk_group(
        problem_, plan_.by_query, group,
        [&](Coord const& origin, Coord const& extent) {
          if (*skipped == 0) {
            take_tile(group.rows.residue, origin, extent);
          }
        },
        [&](int32_t first, int most) {
          extra = true;
          if (*skipped == 0) {
            take_extra(first, most);
          }
        },
        [&](bool masked) {
          if (num_keys_ > 0) {
            this->end_of_taken(extra);
            this->visit(group.rows, masked);
            this->add_taken();
          }
          extra = false;
          ++skipped;
        });
  }

  void take_tile(Coord const& residue, Coord const& origin, Coord const& extent) {
    this->for_each_token(
        problem_.grid_kv, residue, origin, extent, [&](Coord const& position, Coord const& token) {
          Coord seen_at = position;
          if constexpr (M::kByLists) {
            seen_at = M::key_position(position, token);
          }
          int32_t const head = this->head_kv();
          this->take(Base::index_in(problem_.grid_kv, token), token, seen_at,
                     this->row_of(problem_.k, token, head), this->row_of(problem_.v, token, head));
        });
  }
  void take_extra(int32_t first, int most) {
    int64_t const own = volume(problem_.grid_kv);
    int32_t const head = this->head_kv();
    for (int32_t i = first; i < problem_.extra_len && i < first + most; ++i) {
      Coord const token{0, 0, i};
      this->take(own + i, token, token, this->row_of(problem_.extra_k, token, head),
                 this->row_of(problem_.extra_v, token, head));
    }
  }

  uint32_t* group_scratch_ = nullptr;
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
