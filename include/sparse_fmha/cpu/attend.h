// Online-softmax attention of one query tile, driven by the mechanism's walk.
//
// Queries lie across the lanes. Scores are stored [key][query], so maxima and sums are plain vector
// operations, keys and values are used as they are in memory, and the weights are already the
// transposed operand of the second product. The recurrence is from Milakov and Gimelshein, "Online
// normalizer calculation for softmax" (2018), in log2 units.
#pragma once

#include "sparse_fmha/cpu/group_vote.h"
#include "sparse_fmha/cpu/multiply.h"
#include "sparse_fmha/cpu/tokens.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// kSkips: groups of 64 rows vote to skip negligible key tiles (groups.h, group_vote.h).
template <class M, class Element, bool kSkips>
class Attend : Tokens<M, Element> {
  using Base = Tokens<M, Element>;
  using Base::batch_, Base::head_, Base::keys_wide_, Base::params_, Base::problem_,
      Base::values_wide_;
  using Base::kLanes, Base::panel_of, Base::scale_log2_;
  using typename Base::Held;
  using typename Base::In;
  using typename Base::Row;
  using typename Base::T;
  static constexpr int kGroup = kSkips ? kGroupRows : kLanes;  // rows whose scores are held
  static_assert(kGroup % kLanes == 0, "whole panels of scores");
  static constexpr double kLn2 = 0.693147180559945309417;

 public:
  static size_t scratch_bytes(FmhaProblem const& problem, TileShape const& shape) {
    typename M::Params const params{};
    return Attend(problem, params, shape).place(nullptr);
  }

  static void run(FmhaProblem const& problem, void const* params, TileShape const& shape,
                  int64_t item, void* scratch) {
    Attend attend(problem, *static_cast<typename M::Params const*>(params), shape);
    attend.place(scratch);
    attend.query_tile(item);
  }

 private:
  Attend(FmhaProblem const& problem, typename M::Params const& params, TileShape const& shape)
      : Base(problem, params),
        shape_(shape),
        lanes_(round_up(static_cast<int>(volume(shape.q)), kLanes)),
        keys_(round_up(static_cast<int>(volume(shape.k)), kPanelRows)) {}

  // Lays out the buffers in `memory`; returns their size.
  size_t place(void* memory) {
    Buffers buffers(memory);
    int64_t const lanes = lanes_;
    int64_t const keys = keys_;
    buffers.take(queries_, lanes * keys_wide_.numbers);
    buffers.take(out_, lanes * values_wide_.panel);
    buffers.take(max_, lanes);
    buffers.take(sum_, lanes);
    rows_.take(buffers, lanes_);
    buffers.take(query_token_, lanes);
    buffers.take(thresholds_, lanes);
    buffers.take(key_rows_, keys * keys_wide_.numbers);
    buffers.take(values_, keys * values_wide_.panel / kSteps<In>);
    buffers.take(key_position_, keys);
    buffers.take(biases_, keys);
    buffers.take(scores_, keys * kGroup);
    buffers.take(rescale_, kLanes);
    if constexpr (kSkips) {
      vote_.take(buffers);
      buffers.take(group_scratch_, Group<M>::scratch_words(problem_));
    }
    return buffers.used();
  }

  void query_tile(int64_t item) {
    int32_t tiles;
    if constexpr (kSkips) {
      tiles = Group<M>::count(params_, shape_);
    } else {
      tiles = M::num_query_tiles(params_, shape_);
    }
    int64_t const head_index = item / tiles;
    this->select(static_cast<int32_t>(head_index / problem_.heads_q),
                 static_cast<int32_t>(head_index % problem_.heads_q));
    // Starts with the last tile, which is the heaviest under a causal mask.
    int32_t const index = tiles - 1 - static_cast<int32_t>(item % tiles);
    if constexpr (kSkips) {
      visit_group(index);
    } else {
      QueryTile const q = M::query_tile(params_, shape_, index);
      load_queries(q, shape_.q);
      visit_tiles(q);
    }
    store();
  }

  void visit_tiles(QueryTile const& q) {
    this->for_each_key_tile(shape_, q, [&](Coord const& tile, bool masked) {
      int const keys = load_tile(q.residue, tile, shape_.k);
      masked ? visit<true>(keys) : visit<false>(keys);
    });
    for (int32_t first = 0; first < problem_.extra_len; first += keys_) {
      visit<false>(load_extra(first, keys_));
    }
  }

  void visit_group(int32_t index) {
    Group<M> const group(params_, shape_, index, group_scratch_);
    load_queries(group.rows, group.extent);
    if (num_queries_ == 0) {
      return;
    }
    vote_.begin(problem_.skip_threshold[batch_], scale_log2_);
    int keys = 0;
    walk_group(
        problem_, shape_, group,
        [&](Coord const& origin, Coord const& extent) {
          keys = load_tile(group.rows.residue, origin, extent, keys);
        },
        [&](int32_t first, int most) { keys = load_extra(first, most); },
        [&](bool masked) {
          masked ? visit<true>(keys) : visit<false>(keys);
          keys = 0;
        });
    int64_t* const counts = problem_.skip_counts + (int64_t{batch_} * problem_.heads_q + head_) * 2;
    __atomic_fetch_add(counts, vote_.visited(), __ATOMIC_RELAXED);
    __atomic_fetch_add(counts + 1, vote_.skipped(), __ATOMIC_RELAXED);
  }

  void load_queries(QueryTile const& q, Coord const& extent) {
    // Only the sign of the scale; its magnitude goes into the exponent, where it rounds least.
    T const factor = Base::sign(problem_.scale);
    num_queries_ = this->for_each_query(
        q, extent, rows_, query_token_, thresholds_, [&](int lane, Coord const& token) {
          this->load_lane(keys_wide_, this->row_of(problem_.q, token, head_), factor, lane,
                          queries_);
        });
    this->clear_lanes_behind(keys_wide_, num_queries_, queries_);
    int const lanes = round_up(num_queries_, kLanes);
    for (int lane = num_queries_; lane < lanes; ++lane) {
      rows_.clear(lane);
    }
    for (int lane = 0; lane < lanes; ++lane) {
      max_[lane] = -kInfinity<T>;
      sum_[lane] = 0;
    }
    std::memset(out_, 0, sizeof(T) * lanes * values_wide_.panel);
  }

  // Loads keys after the first `keys`; returns their new number.
  int load_tile(Coord const& residue, Coord const& origin, Coord const& extent, int keys = 0) {
    return this->for_each_key(
        residue, origin, extent, keys, key_position_, biases_,
        [&](int key, Element const* k, Element const* v) { load_key(key, k, v); });
  }
  int load_extra(int32_t first, int most) {
    return this->for_each_extra(
        first, most, biases_,
        [&](int key, Element const* k, Element const* v) { load_key(key, k, v); });
  }
  void load_key(int key, Element const* k, Element const* v) {
    this->load_row(keys_wide_, k, key, key_rows_);
    this->load_summand(values_wide_, v, key, keys_, values_);
  }

  template <bool kMasked>
  void visit(int keys) {
    if (keys == 0) {
      return;
    }
    for (int group = 0; group < num_queries_; group += kGroup) {
      int const end = min_int(group + kGroup, num_queries_);
      for (int first = group; first < end; first += kLanes) {
        T* const scores = scores_of(first);
        multiply<false>(Held::rows(key_rows_, keys_wide_.numbers), round_up(keys, kPanelRows),
                        this->panel_at(keys_wide_, first, queries_), vectors(first), keys_wide_.dim,
                        scores, kLanes);
        this->adjust(rows_, thresholds_, first, key_position_, biases_, keys, kMasked, scores);
      }
      if constexpr (kSkips) {
        if (vote_.is_left_out([&](int first) { return scores_of(first); }, keys, max_,
                              num_queries_)) {
          continue;
        }
      }
      for (int first = group; first < end; first += kLanes) {
        weigh(first, keys);
      }
    }
  }
  int vectors(int first) const { return Base::vectors(first, num_queries_); }
  // [key][lane] of the panel that begins at query `first`.
  T* scores_of(int first) const { return scores_ + static_cast<int64_t>(first % kGroup) * keys_; }

  // Turns the scores of a tile into weights and adds its weighted values.
  void weigh(int first, int keys) {
    int const lanes = min_int(num_queries_ - first, kLanes);
    with_vectors(vectors(first), [&](auto count) {
      update_softmax<T, count.value>(scores_of(first), keys, scale_log2_, max_ + first,
                                     sum_ + first, rescale_);
    });
    auto const weights = Held::as_weights(scores_of(first), keys, vectors(first));
    for (int d = 0; d < values_wide_.dim; d += kLanes) {
      int const columns = (min_int(values_wide_.dim - d, kLanes) + kWidth<T> - 1) / kWidth<T>;
      multiply<true>(weights, round_up(lanes, kPanelRows),
                     values_ + static_cast<int64_t>(d) * keys_ / kSteps<In>, columns, keys,
                     out_ + static_cast<int64_t>(first) * values_wide_.panel + d,
                     values_wide_.panel, rescale_);
    }
  }

  void store() {
    TensorView const& o = problem_.out;
    for (int lane = 0; lane < num_queries_; ++lane) {
      Coord const token = query_token_[lane];
      T const sum = sum_[lane];
      T const factor = sum == T(0) ? T(0) : T(1) / sum;
      Element* const to = this->row_of(o, token, head_);
      T const* const from = out_ + static_cast<int64_t>(lane) * values_wide_.panel;
      for (int d = 0; d < values_wide_.dim; ++d) {
        narrow(from[d] * factor, to + d);
      }
      double const lse = (double{max_[lane]} * scale_log2_ + __builtin_log2(sum)) * kLn2;
      problem_.lse[this->index_of(token)] = static_cast<float>(lse);
    }
  }

  TileShape const shape_;
  // Buffer sizes, in whole panels.
  int const lanes_;
  int const keys_;
  int num_queries_ = 0;
  In* queries_;
  T* out_;
  T* max_;
  T* sum_;
  LaneWords<Row> rows_;
  Coord* query_token_;
  float* thresholds_;
  In* key_rows_;
  In* values_;
  Coord* key_position_;
  float* biases_;
  T* scores_;  // [panel of the group][key][lane]
  T* rescale_;
  // If tiles are skipped:
  GroupVote<T> vote_;
  uint32_t* group_scratch_ = nullptr;
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
