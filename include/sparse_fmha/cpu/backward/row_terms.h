// Per-query terms of the gradients: log-sum-exp and delta.
#pragma once

#include "sparse_fmha/cpu/backward/key_tiles.h"
#include "sparse_fmha/cpu/backward/plan.h"
#include "sparse_fmha/cpu/multiply.h"
#include "sparse_fmha/cpu/tokens.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// kSkips: the votes of the forward pass are repeated and noted down.
template <class M, class Element, bool kSkips>
class RowTerms : KeyTiles<M, Element> {
  using Base = KeyTiles<M, Element>;
  using Base::biases_, Base::capacity_, Base::head_, Base::keys_wide_, Base::kLanes;
  using Base::key_position_, Base::params_, Base::problem_, Base::scale_log2_, Base::values_wide_;
  using typename Base::Held;
  using typename Base::In;
  using typename Base::Row;
  using typename Base::T;
  // The forward pass rounds lse to fp32, which is not enough for fp64, so it is recomputed.
  static constexpr bool kFindsLse = sizeof(T) > sizeof(float);
  static constexpr bool kScores = kFindsLse || kSkips;         // whether keys are visited
  static constexpr int kGroup = kSkips ? kGroupRows : kLanes;  // rows whose scores are held

 public:
  static size_t scratch_bytes(FmhaProblem const& problem, BackwardPlan const& plan) {
    typename M::Params const params{};
    return RowTerms(problem, params, plan).place(nullptr);
  }
  static void run(FmhaProblem const& problem, void const* params, BackwardPlan const& plan,
                  int64_t item, void* scratch) {
    RowTerms terms(problem, *static_cast<typename M::Params const*>(params), plan);
    terms.place(scratch);
    terms.query_tile(item);
  }

 private:
  RowTerms(FmhaProblem const& problem, typename M::Params const& params, BackwardPlan const& plan)
      : Base(problem, params, plan.by_query), plan_(plan) {}

  size_t place(void* memory) {
    Buffers buffers(memory);
    int const lanes = round_up(static_cast<int>(volume(plan_.by_query.q)), kLanes);
    rows_.take(buffers, lanes);
    buffers.take(query_token_, lanes);
    buffers.take(thresholds_, lanes);
    buffers.take(max_, lanes);
    buffers.take(sum_, lanes);
    if constexpr (kScores) {
      buffers.take(queries_, int64_t{lanes} * keys_wide_.numbers);
      buffers.take(key_rows_, int64_t{capacity_} * keys_wide_.numbers);
      this->take_keys(buffers);
      buffers.take(scores_, int64_t{capacity_} * kGroup);
      buffers.take(rescale_, kLanes);
    }
    if constexpr (kSkips) {
      vote_.take(buffers);
      buffers.take(group_scratch_, Group<M>::scratch_words(problem_));
    }
    return buffers.used();
  }

  void query_tile(int64_t item) {
    int64_t const head = item / plan_.query_tiles;
    this->select(static_cast<int32_t>(head / problem_.heads_q),
                 static_cast<int32_t>(head % problem_.heads_q));
    auto const index = static_cast<int32_t>(item % plan_.query_tiles);
    if constexpr (kSkips) {
      Group<M> const group(params_, plan_.by_query, index, group_scratch_);
      load_queries(group.rows, group.extent);
      vote(group, plan_.skipped.of(item));
    } else {
      QueryTile const q = M::query_tile(params_, plan_.by_query, index);
      load_queries(q, plan_.by_query.q);
      if constexpr (kFindsLse) {
        find_lse(q);
      }
    }
    for (int lane = 0; lane < num_queries_; ++lane) {
      note(lane);
    }
  }

  void load_queries(QueryTile const& q, Coord const& extent) {
    T const factor = Base::sign(problem_.scale);
    num_queries_ = this->for_each_query(
        q, extent, rows_, query_token_, thresholds_, [&](int lane, Coord const& token) {
          if constexpr (kScores) {
            this->load_lane(keys_wide_, this->row_of(problem_.q, token, head_), factor, lane,
                            queries_);
          }
        });
    if constexpr (kScores) {
      begin_scores();
    }
  }
  void begin_scores() {
    this->clear_lanes_behind(keys_wide_, num_queries_, queries_);
    int const lanes = round_up(num_queries_, kLanes);
    for (int lane = num_queries_; lane < lanes; ++lane) {
      rows_.clear(lane);
    }
    for (int lane = 0; lane < lanes; ++lane) {
      max_[lane] = -kInfinity<T>;
      sum_[lane] = 0;
    }
  }

  // As the forward pass visits them.
  void vote(Group<M> const& group, uint8_t* skipped) {
    if (num_queries_ == 0) {
      return;
    }
    vote_.begin(problem_.skip_threshold[this->batch_], scale_log2_);
    this->walk_voted(group, load_key(), [&](int keys, bool masked) {
      for (int first = 0; keys > 0 && first < num_queries_; first += kLanes) {
        score(first, keys, masked);
      }
      *skipped = keys > 0 && vote_.is_left_out([&](int first) { return scores_of(first); }, keys,
                                               max_, num_queries_);
      for (int first = 0; keys > 0 && !*skipped && first < num_queries_; first += kLanes) {
        add(first, keys);
      }
      ++skipped;
    });
  }

  void find_lse(QueryTile const& q) {
    this->walk_tiles(q, load_key(), [&](int keys, bool masked) {
      for (int first = 0; first < num_queries_; first += kLanes) {
        score(first, keys, masked);
        add(first, keys);
      }
    });
  }

  auto load_key() const {
    return [this](int key, Element const* k, Element const* /*v*/) {
      this->load_row(keys_wide_, k, key, key_rows_);
    };
  }

  // [key][lane] of the panel that begins at query `first`.
  T* scores_of(int first) const {
    return scores_ + static_cast<int64_t>(first % kGroup) * capacity_;
  }
  void score(int first, int keys, bool masked) {
    multiply<false>(Held::rows(key_rows_, keys_wide_.numbers), round_up(keys, kPanelRows),
                    this->panel_at(keys_wide_, first, queries_), Base::vectors(first, num_queries_),
                    keys_wide_.dim, scores_of(first), kLanes);
    this->adjust(rows_, thresholds_, first, key_position_, biases_, keys, masked, scores_of(first));
  }
  // Turns scores into weights, which are of no use, and adds them up.
  void add(int first, int keys) {
    with_vectors(Base::vectors(first, num_queries_), [&](auto count) {
      update_softmax<T, count.value>(scores_of(first), keys, scale_log2_, max_ + first,
                                     sum_ + first, rescale_);
    });
  }

  void note(int lane) {
    Gradients const& gradients = *problem_.gradients;
    Coord const token = query_token_[lane];
    int64_t const index = this->index_of(token);
    T lse;
    if constexpr (kFindsLse) {
      lse = max_[lane] * scale_log2_ + static_cast<T>(__builtin_log2(sum_[lane]));
    } else {
      lse = problem_.lse[index] * static_cast<T>(Base::kLog2e);
    }
    bool const sees_no_key = lse == -kInfinity<T>;
    Element const* const out = this->row_of(problem_.out, token, head_);
    Element const* const gradient = this->row_of(gradients.out, token, head_);
    constexpr int kParts = 8;  // divides every head dim
    T parts[kParts] = {};
    for (int d = 0; d < values_wide_.dim; d += kParts) {
      for (int i = 0; i < kParts; ++i) {
        parts[i] += widen(out[d + i]) * widen(gradient[d + i]);
      }
    }
    T delta = gradients.lse == nullptr ? T(0) : -static_cast<T>(gradients.lse[index]);
    for (int i = 0; i < kParts; ++i) {
      delta += parts[i];
    }
    static_cast<T*>(plan_.lse)[index] = sees_no_key ? kInfinity<T> : lse;
    static_cast<T*>(plan_.delta)[index] = sees_no_key ? T(0) : delta;
  }

  BackwardPlan const& plan_;
  int num_queries_ = 0;
  LaneWords<Row> rows_;
  Coord* query_token_;
  float* thresholds_;
  T* max_;
  T* sum_;
  // If keys are visited:
  In* queries_ = nullptr;
  In* key_rows_ = nullptr;
  T* scores_ = nullptr;
  T* rescale_ = nullptr;
  // If tiles are skipped:
  GroupVote<T> vote_;
  uint32_t* group_scratch_ = nullptr;
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
