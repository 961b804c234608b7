// Gradients of queries: a query tile walks over its keys, as in the forward pass, and owns its
// sums.
#pragma once

#include "sparse_fmha/cpu/backward/key_tiles.h"
#include "sparse_fmha/cpu/backward/plan.h"
#include "sparse_fmha/cpu/backward/summands.h"
#include "sparse_fmha/cpu/backward/weights.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// kSkips: tiles that the forward pass skipped are left out.
template <class M, class Element, bool kSkips>
class QueryGradients : KeyTiles<M, Element> {
  using Base = KeyTiles<M, Element>;
  using Base::biases_, Base::capacity_, Base::head_, Base::keys_wide_, Base::kLanes;
  using Base::key_position_, Base::params_, Base::problem_, Base::scale_log2_, Base::values_wide_;
  using typename Base::Held;
  using typename Base::In;
  using typename Base::Row;
  using typename Base::T;
  using V = Vector<T>;

 public:
  static size_t scratch_bytes(FmhaProblem const& problem, BackwardPlan const& plan) {
    typename M::Params const params{};
    return QueryGradients(problem, params, plan).place(nullptr);
  }
  static void run(FmhaProblem const& problem, void const* params, BackwardPlan const& plan,
                  int64_t item, void* scratch) {
    QueryGradients gradients(problem, *static_cast<typename M::Params const*>(params), plan);
    gradients.place(scratch);
    gradients.query_tile(item);
  }

 private:
  QueryGradients(FmhaProblem const& problem, typename M::Params const& params,
                 BackwardPlan const& plan)
      : Base(problem, params, plan.by_query), plan_(plan) {}

  size_t place(void* memory) {
    Buffers buffers(memory);
    int64_t const lanes = round_up(static_cast<int>(volume(plan_.by_query.q)), kLanes);
    buffers.take(queries_, lanes * keys_wide_.numbers);
    buffers.take(out_gradients_, lanes * values_wide_.numbers);
    buffers.take(sums_, lanes * keys_wide_.panel);
    buffers.take(lse_, lanes);
    buffers.take(delta_, lanes);
    rows_.take(buffers, static_cast<int>(lanes));
    buffers.take(query_token_, lanes);
    buffers.take(thresholds_, lanes);
    keys_.take(buffers, capacity_, keys_wide_.dim);
    buffers.take(values_, int64_t{capacity_} * values_wide_.numbers);
    this->take_keys(buffers);
    buffers.take(scores_, int64_t{capacity_} * kLanes);
    buffers.take(gradients_, int64_t{capacity_} * kLanes);
    if (this->caps()) {
      buffers.take(slopes_, int64_t{capacity_} * kLanes);
    }
    if constexpr (kSkips) {
      buffers.take(group_scratch_, Group<M>::scratch_words(problem_));
    }
    return buffers.used();
  }

  void query_tile(int64_t item) {
    int32_t const tiles = plan_.query_tiles;
    int64_t const head = item / tiles;
    this->select(static_cast<int32_t>(head / problem_.heads_q),
                 static_cast<int32_t>(head % problem_.heads_q));
    // Starts with the last tile, which is the heaviest under a causal mask.
    int32_t const index = tiles - 1 - static_cast<int32_t>(item % tiles);
    if constexpr (kSkips) {
      Group<M> const group(params_, plan_.by_query, index, group_scratch_);
      load_queries(group.rows, group.extent);
      visit_kept(group, plan_.skipped.of(head * tiles + index));
    } else {
      QueryTile const q = M::query_tile(params_, plan_.by_query, index);
      load_queries(q, plan_.by_query.q);
      visit_all(q);
    }
    store();
  }

  void visit_kept(Group<M> const& group, uint8_t const* skipped) {
    this->walk_voted(group, load_pair(), [&](int keys, bool masked) {
      if (*skipped++ == 0) {
        visit(keys, masked);
      }
      keys_.clear();
    });
  }
  void visit_all(QueryTile const& q) {
    this->walk_tiles(q, load_pair(), [&](int keys, bool masked) {
      visit(keys, masked);
      keys_.clear();
    });
  }
  auto load_pair() {
    keys_.clear();
    return [this](int key, Element const* k, Element const* v) {
      keys_.load(k, key);
      this->load_row(values_wide_, v, key, values_);
    };
  }

  void load_queries(QueryTile const& q, Coord const& extent) {
    Gradients const& gradients = *problem_.gradients;
    T const factor = Base::sign(problem_.scale);
    num_queries_ = this->for_each_query(
        q, extent, rows_, query_token_, thresholds_, [&](int lane, Coord const& token) {
          this->load_lane(keys_wide_, this->row_of(problem_.q, token, head_), factor, lane,
                          queries_);
          this->load_lane(values_wide_, this->row_of(gradients.out, token, head_), T(1), lane,
                          out_gradients_);
          int64_t const index = this->index_of(token);
          lse_[lane] = static_cast<T const*>(plan_.lse)[index];
          delta_[lane] = static_cast<T const*>(plan_.delta)[index];
        });
    this->clear_lanes_behind(keys_wide_, num_queries_, queries_);
    this->clear_lanes_behind(values_wide_, num_queries_, out_gradients_);
    int const lanes = round_up(num_queries_, kLanes);
    for (int lane = num_queries_; lane < lanes; ++lane) {
      rows_.clear(lane);
      lse_[lane] = kInfinity<T>;
      delta_[lane] = 0;
    }
    std::memset(sums_, 0, sizeof(T) * lanes * keys_wide_.panel);
  }

  void visit(int keys, bool masked) {
    for (int first = 0; keys > 0 && first < num_queries_; first += kLanes) {
      int const vectors = Base::vectors(first, num_queries_);
      int const rows = round_up(keys, kPanelRows);
      multiply<false>(keys_.factor(), rows, this->panel_at(keys_wide_, first, queries_), vectors,
                      keys_wide_.dim, scores_, kLanes);
      this->adjust(rows_, thresholds_, first, key_position_, biases_, keys, masked, scores_,
                   slopes_);
      multiply<false>(Held::rows(values_, values_wide_.numbers), rows,
                      this->panel_at(values_wide_, first, out_gradients_), vectors,
                      values_wide_.dim, gradients_, kLanes);
      with_vectors(vectors, [&](auto count) {
        V const* const lse = reinterpret_cast<V const*>(lse_ + first);
        V const* const delta = reinterpret_cast<V const*>(delta_ + first);
        weigh_gradients<count.value>(
            scores_, gradients_, keys, scale_log2_, [&](int, int v) { return lse[v]; },
            [&](int, int v) { return delta[v]; });
      });
      if (this->caps()) {
        this->uncap(keys, slopes_, gradients_);
      }
      keys_.add_to(sums_ + static_cast<int64_t>(first) * keys_wide_.panel, gradients_,
                   min_int(num_queries_ - first, kLanes), keys);
    }
  }

  void store() {
    T const scale = static_cast<T>(problem_.scale);
    for (int lane = 0; lane < num_queries_; ++lane) {
      Element* const to = this->row_of(problem_.gradients->q, query_token_[lane], head_);
      T const* const from = sums_ + static_cast<int64_t>(lane) * keys_wide_.panel;
      for (int d = 0; d < keys_wide_.dim; ++d) {
        narrow(from[d] * scale, to + d);
      }
    }
  }

  BackwardPlan const& plan_;
  int num_queries_ = 0;
  In* queries_;
  In* out_gradients_;
  T* sums_;
  T* lse_;
  T* delta_;
  LaneWords<Row> rows_;
  Coord* query_token_;
  float* thresholds_;
  Summands<Element> keys_;
  In* values_;
  T* scores_;                          // overwritten by the weights
  T* gradients_;                       // of the weights, overwritten by those of the scores
  T* slopes_ = nullptr;                // of capped scores
  uint32_t* group_scratch_ = nullptr;  // if tiles are skipped
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
