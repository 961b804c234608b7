// Decode attention of one group of packed rows over a part of its keys: tiles of 64 slots, gathered
// row by row. Rows lie across the lanes, as in attend.h.
#pragma once

#include "sparse_fmha/cpu/decode_isa.h"
#include "sparse_fmha/cpu/decode_partial.h"
#include "sparse_fmha/cpu/multiply.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

template <class Element, bool kSkips>
class Decode {
  using Math = TileMath<Element>;
  using T = typename Math::T;
  using V = Vector<T>;
  static constexpr int kLanes = Math::kLanes;
  static constexpr int kTile = DecodeKeys::kTile;

 public:
  static size_t scratch_bytes(FmhaProblem const& problem) {
    return Decode(problem, {}).place(nullptr);
  }

  static void run(FmhaProblem const& problem, DecodeRows const& rows, KeyRange slots, void* partial,
                  void* scratch) {
    Decode decode(problem, rows);
    decode.place(scratch);
    decode.attend(slots);
    decode.store(Partial<Element>(problem, partial));
  }

 private:
  Decode(FmhaProblem const& problem, DecodeRows const& at)
      : problem_(problem),
        keys_(*problem.decode),
        at_(at),
        dim_(problem.head_dim),
        panel_dim_(round_up(problem.head_dim, kLanes)),
        lanes_(round_up(static_cast<int>(Partial<Element>::rows_of(problem)), kLanes)),
        scale_log2_(Math::scale_log2(problem.scale)),
        raw_cap_(Math::raw_cap(problem.softcap, scale_log2_)) {}

  // Lays out the buffers in `memory`; returns their size.
  size_t place(void* memory) {
    Buffers buffers(memory);
    int64_t const lanes = lanes_;
    buffers.take(queries_, lanes * dim_);
    buffers.take(out_, lanes * panel_dim_);
    buffers.take(max_, lanes);
    buffers.take(sum_, lanes);
    buffers.take(top_, lanes);
    buffers.take(query_, lanes);
    buffers.take(begin_, lanes);
    buffers.take(end_, lanes);
    buffers.take(key_rows_, int64_t{kTile} * dim_);
    buffers.take(values_, int64_t{kTile} * panel_dim_);
    buffers.take(scores_, kTile * lanes);
    buffers.take(rescale_, kLanes);
    return buffers.used();
  }

  void attend(KeyRange slots) {
    range_ = keys_.range(at_.batch, at_.head);
    load_queries();
    if constexpr (kSkips) {
      double const given = problem_.skip_threshold[at_.batch];
      constexpr double kBelowOne = 1 - 0x1p-24;
      double const threshold = given > 0 ? (given < kBelowOne ? given : kBelowOne) : 0;
      margin_ = static_cast<T>(__builtin_log2(threshold)) / scale_log2_;
    }
    for (int64_t slot = slots.begin; slot < slots.end; slot += kTile) {
      gather(static_cast<int32_t>(slot), min_int(kTile, slots.end - static_cast<int32_t>(slot)));
      if (num_keys_ > 0) {
        visit();
      }
    }
    if constexpr (kSkips) {
      int64_t* const counts =
          problem_.skip_counts + (int64_t{at_.batch} * problem_.heads_kv + at_.head) * 2;
      __atomic_fetch_add(counts, visited_, __ATOMIC_RELAXED);
      __atomic_fetch_add(counts + 1, skipped_, __ATOMIC_RELAXED);
    }
  }

  void load_queries() {
    KeyRange const rows = keys_.rows_of(at_.row_group);
    num_rows_ = rows.end - rows.begin;
    first_query_ = rows.begin / keys_.group;
    last_query_ = (rows.end - 1) / keys_.group;
    // Both ends of what queries see grow with the query, or are the same for all.
    KeyRange const first = keys_.visible(range_, first_query_);
    KeyRange const last = keys_.visible(range_, last_query_);
    some_see_ = {first.begin, last.end};
    all_see_ = {last.begin, first.end};
    T const sign = Math::sign(problem_.scale);
    for (int lane = 0; lane < round_up(num_rows_, kLanes); ++lane) {
      bool const is_row = lane < num_rows_;
      int32_t const row = rows.begin + lane;
      int32_t const query = is_row ? row / keys_.group : last_query_;
      KeyRange const seen = is_row ? keys_.visible(range_, query) : KeyRange{0, 0};
      query_[lane] = query;
      begin_[lane] = seen.begin;
      end_[lane] = seen.end;
      max_[lane] = -kInfinity<T>;
      sum_[lane] = 0;
      T* const to = queries_ + Math::panel_of(lane) * dim_ + lane % kLanes;
      Element const* const from =
          static_cast<Element const*>(problem_.q.data) + at_.batch * problem_.q.batch_stride +
          query * problem_.q.axis_stride[kGridAxes - 1] +
          (at_.head * keys_.group + (is_row ? row % keys_.group : 0)) * problem_.q.head_stride;
      for (int d = 0; d < dim_; ++d) {
        to[d * kLanes] = is_row ? widen(from[d]) * sign : T(0);
      }
    }
    std::memset(out_, 0, sizeof(T) * round_up(num_rows_, kLanes) * panel_dim_);
  }

  // Finds the keys of a tile that some row sees, and loads them. Nothing else is read: the rest of
  // a cache may hold NaN, which weights of 0 would let through.
  void gather(int32_t slot, int32_t count) {
    num_keys_ = 0;
    lowest_ = INT32_MAX;
    highest_ = -1;
    for (int32_t i = 0; i < count; ++i) {
      int32_t const position = keys_.position(range_, at_.batch, first_query_, at_.head, slot + i);
      if (position < some_see_.begin || position >= some_see_.end || !in_some_tree(position)) {
        continue;
      }
      int64_t outer = at_.batch;
      int64_t row = position;
      if (keys_.page > 0) {
        outer = keys_.page_table.at(at_.batch, 0, at_.head, position / keys_.page);
        row = position % keys_.page;
        if (outer < 0 || outer >= keys_.pages) {
          continue;
        }
      }
      widen_row(row_of(problem_.k, outer, row), dim_, key_rows_ + num_keys_ * dim_);
      position_[num_keys_] = position;
      outer_[num_keys_] = outer;
      row_[num_keys_] = row;
      ++num_keys_;
      lowest_ = min_int(lowest_, position);
      highest_ = max_int(highest_, position);
    }
  }
  Element const* row_of(TensorView const& t, int64_t outer, int64_t row) const {
    return static_cast<Element const*>(t.data) + outer * t.batch_stride +
           row * t.axis_stride[kGridAxes - 1] + at_.head * t.head_stride;
  }
  bool in_some_tree(int32_t position) const {
    bool seen = keys_.tree.data == nullptr;
    for (int32_t query = first_query_; query <= last_query_ && !seen; ++query) {
      seen = keys_.in_tree(range_, at_.batch, query, position);
    }
    return seen;
  }

  void visit() {
    for (int first = 0; first < num_rows_; first += kLanes) {
      T* const scores = scores_ + first * kTile;
      multiply<false>(Factor<T>{key_rows_, dim_, 1}, round_up(num_keys_, kPanelRows),
                      queries_ + static_cast<int64_t>(first) * dim_, vectors(first), dim_, scores,
                      kLanes);
      if (raw_cap_ != 0) {
        Math::cap(raw_cap_, num_keys_, scores);
      }
      mask(first, scores);
    }
    if constexpr (kSkips) {
      if (is_left_out()) {
        return;
      }
    }
    for (int key = 0; key < num_keys_; ++key) {
      Element const* const from = row_of(problem_.v, outer_[key], row_[key]);
      for (int d = 0; d < dim_; d += kLanes) {
        widen_row(from + d, min_int(dim_ - d, kLanes),
                  values_ + static_cast<int64_t>(d) * kTile + key * kLanes);
      }
    }
    for (int first = 0; first < num_rows_; first += kLanes) {
      weigh(first, scores_ + first * kTile);
    }
  }
  int vectors(int first) const { return Math::vectors(first, num_rows_); }

  // Hides what a row does not see in a panel of scores [key][lane].
  void mask(int first, T* panel) const {
    bool const by_range = lowest_ < all_see_.begin || highest_ >= all_see_.end;
    bool const by_tree = keys_.tree.data != nullptr && highest_ >= range_.end - keys_.len_q;
    for (int key = 0; (by_range || by_tree) && key < num_keys_; ++key) {
      int32_t const position = position_[key];
      T* const scores = panel + key * kLanes;
      int32_t const* const begin = begin_ + first;
      int32_t const* const end = end_ + first;
      for (int lane = 0; lane < kLanes; ++lane) {
        bool const seen = (begin[lane] <= position) & (position < end[lane]);
        scores[lane] = seen ? scores[lane] : -kInfinity<T>;
      }
      for (int lane = 0; by_tree && lane < kLanes; ++lane) {
        if (!keys_.in_tree(range_, at_.batch, query_[first + lane], position)) {
          scores[lane] = -kInfinity<T>;
        }
      }
    }
  }

  // The vote of the rows: true if no row has a score within the threshold of its largest one so
  // far. A row that has seen no key keeps any score but -inf. Every row keeps NaN.
  bool is_left_out() {
    for (int first = 0; first < num_rows_; first += kLanes) {
      with_vectors(vectors(first), [&](auto count) {
        row_tops<T, count.value>(scores_ + first * kTile, num_keys_,
                                 reinterpret_cast<V*>(top_ + first));
      });
    }
    bool counts = false;
    for (int lane = 0; lane < num_rows_; ++lane) {
      T const least = max_[lane] + margin_;
      counts |= !(top_[lane] < (least > -kLargest<T> ? least : -kLargest<T>));
    }
    ++visited_;  // some row sees each key of the tile
    skipped_ += !counts;
    return !counts;
  }

  // Turns the scores of a tile into weights and adds its weighted values.
  void weigh(int first, T* scores) {
    with_vectors(vectors(first), [&](auto count) {
      update_softmax<T, count.value>(scores, num_keys_, scale_log2_, max_ + first, sum_ + first,
                                     rescale_);
    });
    int const rows = round_up(min_int(num_rows_ - first, kLanes), kPanelRows);
    for (int d = 0; d < dim_; d += kLanes) {
      int const columns = (min_int(dim_ - d, kLanes) + kWidth<T> - 1) / kWidth<T>;
      multiply<true>(Factor<T>{scores, 1, kLanes}, rows, values_ + static_cast<int64_t>(d) * kTile,
                     columns, num_keys_, out_ + static_cast<int64_t>(first) * panel_dim_ + d,
                     panel_dim_, rescale_);
    }
  }

  void store(Partial<Element> const& to) const {
    for (int lane = 0; lane < num_rows_; ++lane) {
      std::memcpy(to.out + static_cast<int64_t>(lane) * dim_,
                  out_ + static_cast<int64_t>(lane) * panel_dim_, sizeof(T) * dim_);
      to.max[lane] = max_[lane];
      to.sum[lane] = sum_[lane];
    }
  }

  FmhaProblem const& problem_;
  DecodeKeys const& keys_;
  DecodeRows const at_;
  int const dim_;
  int const panel_dim_;  // in whole panels
  int const lanes_;
  T const scale_log2_;
  T const raw_cap_;  // of raw scores; 0: none
  KeyRange range_ = {0, 0};
  KeyRange some_see_ = {0, 0};
  KeyRange all_see_ = {0, 0};
  int num_rows_ = 0;
  int32_t first_query_ = 0;
  int32_t last_query_ = 0;
  T* queries_;
  T* out_;
  T* max_;
  T* sum_;
  T* top_;
  int32_t* query_;
  int32_t* begin_;
  int32_t* end_;
  T* key_rows_;
  T* values_;
  T* scores_;  // [panel][key][lane]
  T* rescale_;
  // The keys of the tile:
  int num_keys_ = 0;
  int32_t lowest_ = 0;  // of the positions
  int32_t highest_ = 0;
  int32_t position_[kTile];
  int64_t outer_[kTile];  // page, or batch entry of a contiguous cache
  int64_t row_[kTile];
  // If tiles are skipped:
  T margin_ = 0;  // ln(threshold), in raw scores
  int64_t visited_ = 0;
  int64_t skipped_ = 0;
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
