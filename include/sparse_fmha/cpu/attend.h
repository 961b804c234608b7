// Online-softmax attention of one query tile, driven by the mechanism's walk.
//
// Queries lie across the lanes: scores are stored [key][query], so maxima and sums are plain vector
// operations, keys and values are used as they are in memory, and the weights already are the
// transposed factor that the second product reads. Source of the recurrence: Milakov and
// Gimelshein, "Online normalizer calculation for softmax" (2018), in units of log2.
#pragma once

#include <type_traits>

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/cpu/element.h"
#include "sparse_fmha/cpu/groups.h"
#include "sparse_fmha/cpu/multiply.h"
#include "sparse_fmha/cpu/softmax.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// Sizes of a thread's buffers, padded to whole panels. Queries and values are cut in panels:
// [panel][dim][lane] and [panel][key][dim].
template <class T>
struct Extents {
  int lanes;
  int keys;
  int dim;
  int panel_dim;  // dim in whole panels

  Extents(FmhaProblem const& problem, TileShape const& shape)
      : lanes(round_up(static_cast<int>(volume(shape.q)), kPanel<T>)),
        keys(round_up(static_cast<int>(volume(shape.k)), kPanelRows)),
        dim(problem.head_dim),
        panel_dim(round_up(problem.head_dim, kPanel<T>)) {}
};

// kSkips: key tiles that are too small to count are left out, by 64 rows that agree on it
// (groups.h; the rule is reference.skip_attention's).
template <class M, class Element, bool kSkips>
class Attend {
  using T = typename ComputeOf<Element>::type;
  using V = Vector<T>;
  using Row = typename M::Row;
  static constexpr int kLanes = kPanel<T>;
  static constexpr int kGroup = kSkips ? kGroupRows : kLanes;  // rows whose scores are held
  static_assert(kGroup % kLanes == 0, "whole panels of scores");
  static constexpr int kRowWords = sizeof(Row) / sizeof(int32_t);
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kBelowOne = 1 - 0x1p-24;
  static constexpr double kLn2 = 0.693147180559945309417;

 public:
  static size_t scratch_bytes(FmhaProblem const& problem, TileShape const& shape) {
    Attend plan(problem, typename M::Params{}, shape);
    return plan.place(nullptr);
  }

  static void run(FmhaProblem const& problem, void const* params, TileShape const& shape,
                  int64_t item, void* scratch) {
    Attend attend(problem, *static_cast<typename M::Params const*>(params), shape);
    attend.place(static_cast<char*>(scratch));
    attend.query_tile(item);
  }

 private:
  Attend(FmhaProblem const& problem, typename M::Params const& params, TileShape const& shape)
      : problem_(problem),
        params_(params),
        shape_(shape),
        extents_(problem, shape),
        scale_log2_(scale_log2(problem.scale)) {}

  // Not 0, where the mask's -inf would become NaN: the queries are 0 then.
  static T scale_log2(double scale) {
    double const magnitude = __builtin_fabs(scale) * kLog2e;
    return magnitude > kLargest<T>             ? kLargest<T>
           : static_cast<T>(magnitude) == T(0) ? T(1)
                                               : static_cast<T>(magnitude);
  }
  static T sign(double scale) {
    return static_cast<T>(scale * kLog2e) == T(0) ? T(0) : scale < 0 ? T(-1) : T(1);
  }

  // Lays the buffers out in `memory`; returns their size.
  size_t place(char* memory) {
    size_t used = 0;
    auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
          memory == nullptr ? nullptr : memory + used);
      used += round_up_bytes(count * sizeof(*pointer));
    };
    int64_t const lanes = extents_.lanes;
    int64_t const keys = extents_.keys;
    take(queries_, lanes * extents_.dim);
    take(out_, lanes * extents_.panel_dim);
    take(max_, lanes);
    take(sum_, lanes);
    take(rows_, lanes * kRowWords);
    take(query_token_, lanes);
    take(keys_, keys * extents_.dim);
    take(values_, keys * extents_.panel_dim);
    take(key_position_, keys);
    take(scores_, keys * kGroup);
    take(rescale_, kLanes);
    if constexpr (kSkips) {
      take(top_, kGroup);
      take(group_scratch_, Group<M>::scratch_words(problem_));
    }
    return used;
  }
  static size_t round_up_bytes(size_t n) { return (n + 63) / 64 * 64; }

  void query_tile(int64_t item) {
    int32_t tiles;
    if constexpr (kSkips) {
      tiles = Group<M>::count(params_, shape_);
    } else {
      tiles = M::num_query_tiles(params_, shape_);
    }
    int64_t const head_index = item / tiles;
    head_ = static_cast<int32_t>(head_index % problem_.heads_q);
    batch_ = static_cast<int32_t>(head_index / problem_.heads_q);
    if constexpr (M::kByLists) {
      params_ = M::for_head(params_, batch_, head_);
    }
    // From the last tile down: under a causal mask it is the heaviest.
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
    auto const walk = M::walk(params_, shape_, q);
    for (int32_t i = 0; i < walk.num_partial; ++i) {
      visit<true>(load_tile(q.residue, walk.tile(i), shape_.k));
    }
    for (int32_t i = walk.num_partial; i < walk.num_partial + walk.num_full; ++i) {
      Coord const tile = walk.tile(i);
      int const keys = load_tile(q.residue, tile, shape_.k);
      if constexpr (M::kByLists) {
        if (walk.is_cut(tile)) {
          visit<true>(keys);
          continue;
        }
      }
      visit<false>(keys);
    }
    for (int32_t first = 0; first < problem_.extra_len; first += extents_.keys) {
      visit<false>(load_extra(first));
    }
  }

  void visit_group(int32_t index) {
    Group<M> const group(params_, shape_, index, group_scratch_);
    load_queries(group.rows, group.extent);
    if (num_queries_ == 0) {
      return;
    }
    double const given = problem_.skip_threshold[batch_];
    double const threshold = given > 0 ? (given < kBelowOne ? given : kBelowOne) : 0;
    margin_ = static_cast<T>(__builtin_log2(threshold)) / scale_log2_;
    visited_ = skipped_ = 0;
    int const tile_keys = static_cast<int>(volume(shape_.k));
    int const whole = problem_.extra_len / tile_keys * tile_keys;
    if (whole < problem_.extra_len) {
      visit<false>(load_extra(whole));
    }
    int keys = 0;
    group.for_each_tile(
        [&](Coord const& origin, Coord const& extent) {
          keys = load_tile(group.rows.residue, origin, extent, keys);
        },
        [&](bool masked) {
          masked ? visit<true>(keys) : visit<false>(keys);
          keys = 0;
        });
    for (int32_t first = 0; first < whole; first += tile_keys) {
      visit<false>(load_extra(first, tile_keys));
    }
    int64_t* const counts = problem_.skip_counts + (int64_t{batch_} * problem_.heads_q + head_) * 2;
    __atomic_fetch_add(counts, visited_, __ATOMIC_RELAXED);
    __atomic_fetch_add(counts + 1, skipped_, __ATOMIC_RELAXED);
  }

  // Calls body(position, token) for every in-range token of a box.
  template <class Body>
  void for_each_token(Coord const& grid, Coord const& residue, Coord const& origin,
                      Coord const& extent, Body body) const {
    Coord position;
    for (position[0] = origin[0]; position[0] < origin[0] + extent[0]; ++position[0]) {
      for (position[1] = origin[1]; position[1] < origin[1] + extent[1]; ++position[1]) {
        for (position[2] = origin[2]; position[2] < origin[2] + extent[2]; ++position[2]) {
          Coord const token = M::token(params_, residue, position);
          if (token[0] < grid[0] && token[1] < grid[1] && token[2] < grid[2]) {
            body(position, token);
          }
        }
      }
    }
  }

  static Element const* row_of(TensorView const& t, int64_t batch, Coord const& token,
                               int64_t head) {
    return static_cast<Element const*>(t.data) + batch * t.batch_stride +
           token[0] * t.axis_stride[0] + token[1] * t.axis_stride[1] + token[2] * t.axis_stride[2] +
           head * t.head_stride;
  }

  void load_queries(QueryTile const& q, Coord const& extent) {
    num_queries_ = 0;
    // Only the sign of the scale here; the rest comes in the exponent, where it rounds least.
    T const factor = sign(problem_.scale);
    for_each_token(problem_.grid_q, q.residue, q.origin, extent,
                   [&](Coord const& position, Coord const& token) {
                     int const lane = num_queries_++;
                     Row const row = M::row(params_, q.residue, position);
                     int32_t words[kRowWords];
                     std::memcpy(words, &row, sizeof row);
                     for (int i = 0; i < kRowWords; ++i) {
                       rows_[i * extents_.lanes + lane] = words[i];
                     }
                     query_token_[lane] = token;
                     Element const* from = row_of(problem_.q, batch_, token, head_);
                     T* to = queries_ + panel_of(lane) * extents_.dim + lane % kLanes;
                     for (int d = 0; d < extents_.dim; ++d) {
                       to[d * kLanes] = widen(from[d]) * factor;
                     }
                   });
    // The lanes behind the last query compute along, on numbers that do no harm.
    for (int lane = num_queries_; lane < round_up(num_queries_, kWidth<T>); ++lane) {
      T* to = queries_ + panel_of(lane) * extents_.dim + lane % kLanes;
      for (int d = 0; d < extents_.dim; ++d) {
        to[d * kLanes] = 0;
      }
    }
    int const lanes = round_up(num_queries_, kLanes);
    for (int lane = num_queries_; lane < lanes; ++lane) {
      for (int i = 0; i < kRowWords; ++i) {
        rows_[i * extents_.lanes + lane] = 0;
      }
    }
    for (int lane = 0; lane < lanes; ++lane) {
      max_[lane] = -kInfinity<T>;
      sum_[lane] = 0;
    }
    std::memset(out_, 0, sizeof(T) * lanes * extents_.panel_dim);
  }
  static int64_t panel_of(int lane) { return lane - lane % kLanes; }

  // Loads keys behind the `keys` that there are; returns how many there are then.
  int load_tile(Coord const& residue, Coord const& origin, Coord const& extent, int keys = 0) {
    int32_t const head = head_ / (problem_.heads_q / problem_.heads_kv);
    for_each_token(problem_.grid_kv, residue, origin, extent,
                   [&](Coord const& position, Coord const& token) {
                     if constexpr (M::kByLists) {
                       key_position_[keys] = M::key_position(position, token);
                     } else {
                       key_position_[keys] = position;
                     }
                     load_key(keys++, row_of(problem_.k, batch_, token, head),
                              row_of(problem_.v, batch_, token, head));
                   });
    return keys;
  }
  int load_extra(int32_t first) { return load_extra(first, extents_.keys); }
  int load_extra(int32_t first, int most) {
    int keys = 0;
    int32_t const head = head_ / (problem_.heads_q / problem_.heads_kv);
    for (int32_t i = first; i < problem_.extra_len && keys < most; ++i) {
      Coord const token{0, 0, i};
      load_key(keys++, row_of(problem_.extra_k, batch_, token, head),
               row_of(problem_.extra_v, batch_, token, head));
    }
    return keys;
  }
  void load_key(int key, Element const* k, Element const* v) {
    widen_row(k, extents_.dim, keys_ + static_cast<int64_t>(key) * extents_.dim);
    for (int first = 0; first < extents_.dim; first += kLanes) {
      widen_row(v + first, min_int(extents_.dim - first, kLanes),
                values_ + static_cast<int64_t>(first) * extents_.keys + key * kLanes);
    }
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
        multiply<false>(Factor<T>{keys_, extents_.dim, 1}, round_up(keys, kPanelRows),
                        queries_ + static_cast<int64_t>(first) * extents_.dim, vectors(first),
                        extents_.dim, scores, kLanes);
        if constexpr (kMasked) {
          mask(first, keys);
        }
      }
      if constexpr (kSkips) {
        if (is_left_out(keys)) {
          continue;
        }
      }
      for (int first = group; first < end; first += kLanes) {
        weigh(first, keys);
      }
    }
  }
  int vectors(int first) const {
    return (min_int(num_queries_ - first, kLanes) + kWidth<T> - 1) / kWidth<T>;
  }
  // [key][lane] of the panel that begins at query `first`.
  T* scores_of(int first) const {
    return scores_ + static_cast<int64_t>(first % kGroup) * extents_.keys;
  }

  // Adds the values of a tile with the weights that its scores become.
  void weigh(int first, int keys) {
    int const lanes = min_int(num_queries_ - first, kLanes);
    with_vectors(vectors(first), [&](auto count) {
      update_softmax<T, count.value>(scores_of(first), keys, scale_log2_, max_ + first,
                                     sum_ + first, rescale_);
    });
    for (int d = 0; d < extents_.dim; d += kLanes) {
      int const columns = (min_int(extents_.dim - d, kLanes) + kWidth<T> - 1) / kWidth<T>;
      multiply<true>(Factor<T>{scores_of(first), 1, kLanes}, round_up(lanes, kPanelRows),
                     values_ + static_cast<int64_t>(d) * extents_.keys, columns, keys,
                     out_ + static_cast<int64_t>(first) * extents_.panel_dim + d,
                     extents_.panel_dim, rescale_);
    }
  }

  // The vote of the rows at hand: whether none of them has a score that comes within the threshold
  // of its largest one so far.
  bool is_left_out(int keys) {
    for (int first = 0; first < num_queries_; first += kLanes) {
      with_vectors(vectors(first), [&](auto count) {
        row_tops<T, count.value>(scores_of(first), keys, reinterpret_cast<V*>(top_ + first));
      });
    }
    bool visited = false;
    bool counts = false;
    for (int lane = 0; lane < num_queries_; ++lane) {
      visited |= top_[lane] != -kInfinity<T>;
      // A row that has seen nothing keeps any score but -inf, and every row what is no number.
      T const least = max_[lane] + margin_;
      counts |= !(top_[lane] < (least > -kLargest<T> ? least : -kLargest<T>));
    }
    visited_ += visited;
    skipped_ += visited && !counts;
    return !counts;
  }

  void mask(int first, int keys) {
    for (int key = 0; key < keys; ++key) {
      Coord const position = key_position_[key];
      T* const scores = scores_of(first) + key * kLanes;
      int32_t const* const rows = rows_ + first;
      for (int lane = 0; lane < kLanes; ++lane) {
        int32_t words[kRowWords];
        for (int i = 0; i < kRowWords; ++i) {
          words[i] = rows[i * extents_.lanes + lane];
        }
        Row row;
        std::memcpy(&row, words, sizeof row);
        scores[lane] = M::visible(params_, row, position) ? scores[lane] : -kInfinity<T>;
      }
    }
  }

  void store() {
    TensorView const& o = problem_.out;
    for (int lane = 0; lane < num_queries_; ++lane) {
      Coord const token = query_token_[lane];
      T const sum = sum_[lane];
      T const factor = sum == T(0) ? T(0) : T(1) / sum;
      Element* const to = const_cast<Element*>(row_of(o, batch_, token, head_));
      T const* const from = out_ + static_cast<int64_t>(lane) * extents_.panel_dim;
      for (int d = 0; d < extents_.dim; ++d) {
        narrow(from[d] * factor, to + d);
      }
      Coord const grid = problem_.grid_q;
      int64_t const index =
          ((static_cast<int64_t>(batch_) * grid[0] + token[0]) * grid[1] + token[1]) * grid[2] +
          token[2];
      double const lse = (double{max_[lane]} * scale_log2_ + __builtin_log2(sum)) * kLn2;
      problem_.lse[index * problem_.heads_q + head_] = static_cast<float>(lse);
    }
  }

  FmhaProblem const& problem_;
  typename M::Params params_;
  TileShape const shape_;
  Extents<T> const extents_;
  T const scale_log2_;
  int32_t batch_ = 0;
  int32_t head_ = 0;
  int num_queries_ = 0;
  T* queries_;
  T* out_;
  T* max_;
  T* sum_;
  int32_t* rows_;  // [word][lane]
  Coord* query_token_;
  T* keys_;
  T* values_;
  Coord* key_position_;
  T* scores_;  // [panel of the group][key][lane]
  T* rescale_;
  // Where tiles are left out:
  T* top_ = nullptr;
  uint32_t* group_scratch_ = nullptr;
  T margin_ = 0;  // ln(threshold), in raw scores
  int64_t visited_ = 0;
  int64_t skipped_ = 0;
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
