// Online-softmax attention of one query tile, driven by the mechanism's walk.
//
// Queries lie across the lanes: scores are stored [key][query], so maxima and sums are plain vector
// operations, keys and values are used as they are in memory, and the weights already are the
// transposed factor that the second product reads. Source of the recurrence: Milakov and
// Gimelshein, "Online normalizer calculation for softmax" (2018), in units of log2.
#pragma once

#include <type_traits>

#include "sparse_fmha/cpu/element.h"
#include "sparse_fmha/cpu/multiply.h"
#include "sparse_fmha/params.h"

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

template <class M, class Element>
class Attend {
  using T = typename ComputeOf<Element>::type;
  using V = Vector<T>;
  using Row = typename M::Row;
  static constexpr int kLanes = kPanel<T>;
  static constexpr int kRowWords = sizeof(Row) / sizeof(int32_t);
  static constexpr T kInfinity = __builtin_inf();
  static constexpr T kLargest = sizeof(T) == 4 ? __FLT_MAX__ : static_cast<T>(__DBL_MAX__);
  static constexpr double kLog2e = 1.44269504088896340736;
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
    return magnitude > kLargest                ? kLargest
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
    take(scores_, keys * kLanes);
    take(rescale_, kLanes);
    return used;
  }
  static size_t round_up_bytes(size_t n) { return (n + 63) / 64 * 64; }

  void query_tile(int64_t item) {
    int32_t const tiles = M::num_query_tiles(params_, shape_);
    int64_t const head_index = item / tiles;
    head_ = static_cast<int32_t>(head_index % problem_.heads_q);
    batch_ = static_cast<int32_t>(head_index / problem_.heads_q);
    if constexpr (M::kByLists) {
      params_ = M::for_head(params_, batch_, head_);
    }
    // From the last tile down: under a causal mask it is the heaviest.
    QueryTile const q =
        M::query_tile(params_, shape_, tiles - 1 - static_cast<int32_t>(item % tiles));
    load_queries(q);

    auto const walk = M::walk(params_, shape_, q);
    for (int32_t i = 0; i < walk.num_partial; ++i) {
      visit<true>(load_tile(q.residue, walk.tile(i)));
    }
    for (int32_t i = walk.num_partial; i < walk.num_partial + walk.num_full; ++i) {
      Coord const tile = walk.tile(i);
      int const keys = load_tile(q.residue, tile);
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
    store();
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

  void load_queries(QueryTile const& q) {
    num_queries_ = 0;
    // Only the sign of the scale here; the rest comes in the exponent, where it rounds least.
    T const factor = sign(problem_.scale);
    for_each_token(problem_.grid_q, q.residue, q.origin, shape_.q,
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
      max_[lane] = -kInfinity;
      sum_[lane] = 0;
    }
    std::memset(out_, 0, sizeof(T) * lanes * extents_.panel_dim);
  }
  static int64_t panel_of(int lane) { return lane - lane % kLanes; }

  // Returns the number of keys loaded.
  int load_tile(Coord const& residue, Coord const& origin) {
    int keys = 0;
    int32_t const head = head_ / (problem_.heads_q / problem_.heads_kv);
    for_each_token(problem_.grid_kv, residue, origin, shape_.k,
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
  int load_extra(int32_t first) {
    int keys = 0;
    int32_t const head = head_ / (problem_.heads_q / problem_.heads_kv);
    for (int32_t i = first; i < problem_.extra_len && keys < extents_.keys; ++i) {
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
    for (int first = 0; first < num_queries_; first += kLanes) {
      int const lanes = min_int(num_queries_ - first, kLanes);
      int const vectors = (lanes + kWidth<T> - 1) / kWidth<T>;
      multiply<false>(Factor<T>{keys_, extents_.dim, 1}, round_up(keys, kPanelRows),
                      queries_ + static_cast<int64_t>(first) * extents_.dim, vectors, extents_.dim,
                      scores_, kLanes);
      if constexpr (kMasked) {
        mask(first, keys);
      }
      with_vectors(vectors, [&](auto count) { update_softmax<count.value>(first, keys); });
      for (int d = 0; d < extents_.dim; d += kLanes) {
        int const columns = (min_int(extents_.dim - d, kLanes) + kWidth<T> - 1) / kWidth<T>;
        multiply<true>(Factor<T>{scores_, 1, kLanes}, round_up(lanes, kPanelRows),
                       values_ + static_cast<int64_t>(d) * extents_.keys, columns, keys,
                       out_ + static_cast<int64_t>(first) * extents_.panel_dim + d,
                       extents_.panel_dim, rescale_);
      }
    }
  }

  void mask(int first, int keys) {
    for (int key = 0; key < keys; ++key) {
      Coord const position = key_position_[key];
      T* const scores = scores_ + key * kLanes;
      int32_t const* const rows = rows_ + first;
      for (int lane = 0; lane < kLanes; ++lane) {
        int32_t words[kRowWords];
        for (int i = 0; i < kRowWords; ++i) {
          words[i] = rows[i * extents_.lanes + lane];
        }
        Row row;
        std::memcpy(&row, words, sizeof row);
        scores[lane] = M::visible(params_, row, position) ? scores[lane] : -kInfinity;
      }
    }
  }

  // Turns scores into weights relative to the running maximum.
  template <int kVectors>
  void update_softmax(int first, int keys) {
    V* const max_seen = reinterpret_cast<V*>(max_ + first);
    V* const sum = reinterpret_cast<V*>(sum_ + first);
    V top[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      top[v] = broadcast(-kInfinity);
    }
    for (int key = 0; key < keys; ++key) {
      V const* const scores = reinterpret_cast<V const*>(scores_ + key * kLanes);
      for (int v = 0; v < kVectors; ++v) {
        top[v] = max(top[v], scores[v]);
      }
    }
    V base[kVectors];
    V total[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      // Finite, so that neither a row without keys nor an overflow makes inf - inf.
      V const most = max(max_seen[v], top[v]);
      V const bounded = most > kLargest ? broadcast(kLargest) : most;
      base[v] = bounded < -kLargest ? V{} : bounded;
      V const rescale = exp2<T>((max_seen[v] - base[v]) * scale_log2_);
      reinterpret_cast<V*>(rescale_)[v] = rescale;
      sum[v] *= rescale;
      max_seen[v] = bounded;
      total[v] = V{};
    }
    for (int key = 0; key < keys; ++key) {
      V* const scores = reinterpret_cast<V*>(scores_ + key * kLanes);
      for (int v = 0; v < kVectors; ++v) {
        V const x = (scores[v] - base[v]) * scale_log2_;
        scores[v] = exp2<T>(x > T(0) ? V{} : x);
        total[v] += scores[v];
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      sum[v] += total[v];
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
  T* scores_;
  T* rescale_;
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
