// Gradients of keys and values: keys lie across the lanes, and rows of queries pass by.
#pragma once

#include "sparse_fmha/cpu/backward/plan.h"
#include "sparse_fmha/cpu/backward/summands.h"
#include "sparse_fmha/cpu/backward/weights.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// Up to `lanes` keys of a (batch entry, key head), and the sums of their gradients.
template <class M, class Element>
class KeyLanes : protected Tokens<M, Element> {
 protected:
  using Base = Tokens<M, Element>;
  using Base::head_, Base::keys_wide_, Base::kLanes, Base::params_, Base::problem_,
      Base::scale_log2_, Base::values_wide_;
  using typename Base::In;
  using typename Base::Row;
  using typename Base::T;
  using typename Base::Width;
  using V = Vector<T>;

  KeyLanes(FmhaProblem const& problem, typename M::Params const& params, BackwardPlan const& plan)
      : Base(problem, params), plan_(plan) {}

  void place(Buffers& buffers) {
    capacity_ = round_up(static_cast<int>(volume(plan_.by_key.k)), kLanes);
    int64_t const lanes = capacity_;
    int const rows = round_up(static_cast<int>(volume(plan_.by_key.q)), kPanelRows);
    buffers.take(keys_, lanes * keys_wide_.numbers);
    buffers.take(values_, lanes * values_wide_.numbers);
    buffers.take(key_sums_, lanes * keys_wide_.panel);
    buffers.take(value_sums_, lanes * values_wide_.panel);
    positions_.take(buffers, capacity_);
    buffers.take(tokens_, lanes);
    queries_.take(buffers, rows, keys_wide_.dim);
    out_gradients_.take(buffers, rows, values_wide_.dim);
    buffers.take(rows_, rows);
    buffers.take(lse_, rows);
    buffers.take(delta_, rows);
    buffers.take(scores_, int64_t{rows} * kLanes);
    buffers.take(gradients_, int64_t{rows} * kLanes);
    if (this->caps()) {
      buffers.take(slopes_, int64_t{rows} * kLanes);
    }
    if (problem_.key_bias.data != nullptr) {
      buffers.take(biases_, lanes);
      buffers.take(raw_biases_, lanes);
      buffers.take(bias_sums_, lanes);
      buffers.take(thresholds_, rows);
    }
  }

  // For all query heads of the key head, in order.
  template <class Body>
  void for_each_head(int32_t batch, int32_t head_kv, Body body) {
    for (int32_t i = 0; i < this->group(); ++i) {
      this->select(batch, head_kv * this->group() + i);
      body();
    }
  }
  bool has_bias() const { return this->key_bias_ != nullptr; }
  // Whether the gradient of the bias is wanted.
  bool sums_biases() const { return has_bias() && problem_.gradients->key_bias != nullptr; }
  // The selected head's biases of the loaded keys, or 0 for extra tokens. Clears their sums.
  void load_biases(bool extra) {
    int const lanes = round_up(num_keys_, kLanes);
    for (int lane = 0; lane < lanes; ++lane) {
      bool const zero = extra || lane >= num_keys_;
      biases_[lane] = zero ? 0 : this->key_bias_[Base::index_in(problem_.grid_kv, tokens_[lane])];
      raw_biases_[lane] = this->raw_bias(biases_[lane]);
      bias_sums_[lane] = 0;
    }
  }
  // Where the gradient of the bias of the selected head's first key is.
  float* bias_gradient() const {
    int64_t const head = int64_t{this->batch_} * problem_.heads_q + head_;
    return problem_.gradients->key_bias + head * volume(problem_.grid_kv);
  }

  void clear() { num_keys_ = 0; }
  // position: the key's position, for visible().
  void load_key(Coord const& token, Coord const& position, Element const* k, Element const* v) {
    int const lane = num_keys_++;
    tokens_[lane] = token;
    positions_.set(lane, position);
    this->load_lane(keys_wide_, k, Base::sign(problem_.scale), lane, keys_);
    this->load_lane(values_wide_, v, T(1), lane, values_);
  }
  void end_of_keys() {
    this->clear_lanes_behind(keys_wide_, num_keys_, keys_);
    this->clear_lanes_behind(values_wide_, num_keys_, values_);
    int const lanes = round_up(num_keys_, kLanes);
    for (int lane = num_keys_; lane < lanes; ++lane) {
      positions_.clear(lane);
    }
    std::memset(key_sums_, 0, sizeof(T) * lanes * keys_wide_.panel);
    std::memset(value_sums_, 0, sizeof(T) * lanes * values_wide_.panel);
  }

  // Adds the contributions of the queries of a box to the gradients.
  void visit(QueryTile const& q, bool masked) {
    Gradients const& gradients = *problem_.gradients;
    queries_.clear();
    out_gradients_.clear();
    int rows = 0;
    this->for_each_token(problem_.grid_q, q.residue, q.origin, plan_.by_key.q,
                         [&](Coord const& position, Coord const& token) {
                           queries_.load(this->row_of(problem_.q, token, head_), rows);
                           out_gradients_.load(this->row_of(gradients.out, token, head_), rows);
                           rows_[rows] = M::row(params_, q.residue, position);
                           if (this->row_threshold_ != nullptr) {
                             thresholds_[rows] =
                                 this->row_threshold_[Base::index_in(problem_.grid_q, token)];
                           }
                           int64_t const index = this->index_of(token);
                           lse_[rows] = static_cast<T const*>(plan_.lse)[index];
                           delta_[rows] = static_cast<T const*>(plan_.delta)[index];
                           ++rows;
                         });
    for (int first = 0; rows > 0 && first < num_keys_; first += kLanes) {
      int const vectors = Base::vectors(first, num_keys_);
      int const padded = round_up(rows, kPanelRows);
      multiply<false>(queries_.factor(), padded, this->panel_at(keys_wide_, first, keys_), vectors,
                      keys_wide_.dim, scores_, kLanes);
      if (this->caps()) {
        this->cap(this->raw_cap_, rows, scores_, slopes_);
      }
      if (has_bias()) {
        add_biases(first, rows);
      }
      if (masked) {
        hide(first, rows);
      }
      multiply<false>(out_gradients_.factor(), padded, this->panel_at(values_wide_, first, values_),
                      vectors, values_wide_.dim, gradients_, kLanes);
      with_vectors(vectors, [&](auto count) {
        weigh_gradients<count.value>(
            scores_, gradients_, rows, scale_log2_,
            [&](int row, int) { return broadcast(lse_[row]); },
            [&](int row, int) { return broadcast(delta_[row]); });
      });
      if (sums_biases()) {
        add_bias_gradients(first, rows);
      }
      if (this->caps()) {
        this->uncap(rows, slopes_, gradients_);
      }
      auto const at = static_cast<int64_t>(first);
      int const lanes = min_int(num_keys_ - first, kLanes);
      out_gradients_.add_to(value_sums_ + at * values_wide_.panel, scores_, lanes, rows);
      queries_.add_to(key_sums_ + at * keys_wide_.panel, gradients_, lanes, rows);
    }
  }

  // Keys of bias -inf, or below a row's threshold, are hidden.
  __attribute__((noinline)) void add_biases(int first, int rows) {
    for (int row = 0; row < rows; ++row) {
      T* const scores = scores_ + row * kLanes;
      T const* const raw = raw_biases_ + first;
      for (int lane = 0; lane < kLanes; ++lane) {
        scores[lane] = raw[lane] == -kInfinity<T> ? raw[lane] : scores[lane] + raw[lane];
      }
      for (int lane = 0; this->row_threshold_ != nullptr && lane < kLanes; ++lane) {
        scores[lane] = biases_[first + lane] >= thresholds_[row] ? scores[lane] : -kInfinity<T>;
      }
    }
  }
  __attribute__((noinline)) void add_bias_gradients(int first, int rows) {
    for (int row = 0; row < rows; ++row) {
      for (int lane = 0; lane < kLanes; ++lane) {
        bias_sums_[first + lane] += gradients_[row * kLanes + lane];
      }
    }
  }

  void hide(int first, int rows) {
    for (int row = 0; row < rows; ++row) {
      T* const scores = scores_ + row * kLanes;
      for (int lane = 0; lane < kLanes; ++lane) {
        scores[lane] = M::visible(params_, rows_[row], positions_.get(first + lane))
                           ? scores[lane]
                           : -kInfinity<T>;
      }
    }
  }

  // Writes sums as a row of a gradient, if it is wanted.
  void store(Width const& width, TensorView const& gradient, Coord const& token, int32_t head_kv,
             T const* from, T factor) const {
    if (gradient.data == nullptr) {
      return;
    }
    Element* const to = this->row_of(gradient, token, head_kv);
    for (int d = 0; d < width.dim; ++d) {
      narrow(from[d] * factor, to + d);
    }
  }

  BackwardPlan const& plan_;
  int capacity_ = 0;
  int num_keys_ = 0;
  In* keys_;
  In* values_;
  T* key_sums_;
  T* value_sums_;
  LaneWords<Coord> positions_;
  Coord* tokens_;
  Summands<Element> queries_;
  Summands<Element> out_gradients_;
  Row* rows_;
  T* lse_;
  T* delta_;
  T* scores_;            // overwritten by the weights
  T* gradients_;         // of the weights, overwritten by those of the scores
  T* slopes_ = nullptr;  // of capped scores
  // If there are biases:
  float* biases_ = nullptr;  // [lane]
  T* raw_biases_ = nullptr;  // as summands of raw scores
  T* bias_sums_ = nullptr;
  float* thresholds_ = nullptr;  // [row]
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
