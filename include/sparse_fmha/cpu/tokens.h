// How attention passes read tiles of tokens: the rows of each tensor, and what queries see.
#pragma once

#include <cstring>
#include <type_traits>

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/cpu/operands.h"
#include "sparse_fmha/cpu/softmax.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// Lays out buffers one after another, each aligned to 64 bytes. Without memory it only counts.
class Buffers {
 public:
  explicit Buffers(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class P>
  void take(P*& pointer, int64_t count) {
    pointer = memory_ == nullptr ? nullptr : reinterpret_cast<P*>(memory_ + used_);
    used_ += (count * sizeof(P) + 63) / 64 * 64;
  }
  size_t used() const { return used_; }

 private:
  char* const memory_;
  size_t used_ = 0;
};

// Structs of 32-bit words, stored word by word, so that loops over lanes read vectors.
template <class Struct>
struct LaneWords {
  static constexpr int kWords = sizeof(Struct) / sizeof(int32_t);

  int32_t* words = nullptr;
  int lanes = 0;

  void take(Buffers& buffers, int count) {
    lanes = count;
    buffers.take(words, int64_t{kWords} * count);
  }
  void set(int lane, Struct const& value) const {
    int32_t parts[kWords];
    std::memcpy(parts, &value, sizeof value);
    for (int i = 0; i < kWords; ++i) {
      words[i * lanes + lane] = parts[i];
    }
  }
  void clear(int lane) const {
    for (int i = 0; i < kWords; ++i) {
      words[i * lanes + lane] = 0;
    }
  }
  Struct get(int lane) const {
    int32_t parts[kWords];
    for (int i = 0; i < kWords; ++i) {
      parts[i] = words[i * lanes + lane];
    }
    Struct value;
    std::memcpy(&value, parts, sizeof value);
    return value;
  }
};

// One head of a problem. Operands across the lanes are in panels [panel][dim][lane], operands that
// a product sums over are in panels [panel][row][dim], and the others are in rows [row][dim].
template <class M, class Element>
class Tokens {
 protected:
  using T = typename ComputeOf<Element>::type;
  using Held = Operands<Element>;
  using In = typename Held::In;
  using Row = typename M::Row;
  static constexpr int kLanes = kPanel<T>;
  static constexpr double kLog2e = 1.44269504088896340736;

  // Elements of a row of keys or of values, and how many numbers operands and sums have for it.
  struct Width {
    explicit Width(int of_row)
        : dim(of_row), numbers(Held::numbers(of_row)), panel(round_up(of_row, kLanes)) {}
    int dim;
    int numbers;  // of an operand's row, along the head dim
    int panel;    // in whole panels
  };

  Tokens(FmhaProblem const& problem, typename M::Params const& params)
      : problem_(problem),
        params_(params),
        all_(params),
        keys_wide_(problem.head_dim),
        values_wide_(problem.value_dim),
        scale_log2_(scale_log2(problem.scale)),
        raw_cap_(raw_cap(problem.softcap, scale_log2_)) {}

  void select(int32_t batch, int32_t head) {
    batch_ = batch;
    head_ = head;
    if constexpr (M::kByLists) {
      params_ = M::for_head(all_, batch, head);
    }
    key_bias_ = numbers_of(problem_.key_bias);
    row_threshold_ = numbers_of(problem_.row_threshold);
  }
  int32_t group() const { return problem_.heads_q / problem_.heads_kv; }
  int32_t head_kv() const { return head_ / group(); }

  // Factor of the scores; the sign of the scale goes into one of their operands. A small scale goes
  // there as a whole: 0 would turn the mask's -inf into NaN, and a bias is divided by this factor.
  static constexpr double kLeastScale = 1e-20;
  static T scale_log2(double scale) {
    double const magnitude = __builtin_fabs(scale) * kLog2e;
    return magnitude > kLargest<T>   ? kLargest<T>
           : magnitude < kLeastScale ? T(1)
                                     : static_cast<T>(magnitude);
  }
  static T sign(double scale) {
    double const factor = scale * kLog2e;
    return __builtin_fabs(factor) < kLeastScale ? static_cast<T>(factor) : T(scale < 0 ? -1 : 1);
  }
  // The cap of raw scores, with a finite inverse; 0: none.
  static T raw_cap(double softcap, T scale_log2) {
    constexpr double kLeast = 1e-37;
    double const raw = softcap * kLog2e / scale_log2;
    return softcap == 0       ? T(0)
           : raw > 1 / kLeast ? static_cast<T>(1 / kLeast)
           : raw < kLeast     ? static_cast<T>(kLeast)
                              : static_cast<T>(raw);
  }

  // The numbers of the selected head.
  float const* numbers_of(TokenNumbers const& all) const {
    return all.data == nullptr ? nullptr
                               : all.data + batch_ * all.batch_stride + head_ * all.head_stride;
  }
  // Index of a token in them.
  static int64_t index_in(Coord const& grid, Coord const& token) {
    return (int64_t{token[0]} * grid[1] + token[1]) * grid[2] + token[2];
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

  Element* row_of(TensorView const& t, Coord const& token, int64_t head) const {
    return static_cast<Element*>(t.data) + batch_ * t.batch_stride + token[0] * t.axis_stride[0] +
           token[1] * t.axis_stride[1] + token[2] * t.axis_stride[2] + head * t.head_stride;
  }
  // Index of a query in lse and arrays of its shape.
  int64_t index_of(Coord const& token) const {
    Coord const& grid = problem_.grid_q;
    int64_t const row = batch_ * volume(grid) + index_in(grid, token);
    return row * problem_.heads_q + head_;
  }

  // Calls body(lane, token) for the queries of a box and records their rows, tokens and any
  // thresholds; returns their number.
  template <class Body>
  int for_each_query(QueryTile const& q, Coord const& extent, LaneWords<Row> const& rows,
                     Coord* tokens, float* thresholds, Body body) const {
    int lanes = 0;
    for_each_token(problem_.grid_q, q.residue, q.origin, extent,
                   [&](Coord const& position, Coord const& token) {
                     rows.set(lanes, M::row(params_, q.residue, position));
                     tokens[lanes] = token;
                     if (row_threshold_ != nullptr) {
                       thresholds[lanes] = row_threshold_[index_in(problem_.grid_q, token)];
                     }
                     body(lanes++, token);
                   });
    return lanes;
  }

  // Calls body(tile, masked) for the key tiles that a query tile visits.
  template <class Body>
  void for_each_key_tile(TileShape const& shape, QueryTile const& q, Body body) const {
    auto const walk = M::walk(params_, shape, q);
    for (int32_t i = 0; i < walk.num_partial; ++i) {
      body(walk.tile(i), true);
    }
    for (int32_t i = walk.num_partial; i < walk.num_partial + walk.num_full; ++i) {
      Coord const tile = walk.tile(i);
      if constexpr (M::kByLists) {
        body(tile, walk.is_cut(tile));
      } else {
        body(tile, false);
      }
    }
  }

  // Calls body(place, k, v) with the rows of a box of keys, placed after the first `keys`; returns
  // the new number. Records the positions for visible(), and any biases.
  template <class Body>
  int for_each_key(Coord const& residue, Coord const& origin, Coord const& extent, int keys,
                   Coord* positions, float* biases, Body body) const {
    int32_t const head = head_kv();
    float const* const own_biases = key_bias_;
    for_each_token(problem_.grid_kv, residue, origin, extent,
                   [&](Coord const& position, Coord const& token) {
                     if constexpr (M::kByLists) {
                       positions[keys] = M::key_position(position, token);
                     } else {
                       positions[keys] = position;
                     }
                     if (own_biases != nullptr) {
                       biases[keys] = own_biases[index_in(problem_.grid_kv, token)];
                     }
                     body(keys++, row_of(problem_.k, token, head), row_of(problem_.v, token, head));
                   });
    return keys;
  }
  // The same for up to `most` extra tokens, starting at the given one; their bias is 0.
  template <class Body>
  int for_each_extra(int32_t first, int most, float* biases, Body body) const {
    int keys = 0;
    int32_t const head = head_kv();
    for (int32_t i = first; i < problem_.extra_len && keys < most; ++i) {
      Coord const token{0, 0, i};
      if (key_bias_ != nullptr) {
        biases[keys] = 0;
      }
      body(keys++, row_of(problem_.extra_k, token, head), row_of(problem_.extra_v, token, head));
    }
    return keys;
  }

  // Loads a row, times a factor, into one lane.
  void load_lane(Width const& width, Element const* from, T factor, int lane, In* panels) const {
    Held::load_lane(from, width.dim, factor, lane_of(width, lane, panels));
  }
  // Zeroes the unused lanes of the last vector, which are computed as well.
  void clear_lanes_behind(Width const& width, int last, In* panels) const {
    for (int lane = last; lane < round_up(last, kWidth<T>); ++lane) {
      for (int i = 0; i < width.numbers; ++i) {
        lane_of(width, lane, panels)[i * kLanes] = In{};
      }
    }
  }
  void load_row(Width const& width, Element const* from, int row, In* rows) const {
    Held::load_row(from, width.dim, rows + static_cast<int64_t>(row) * width.numbers);
  }
  // Rows that are loaded in order. `capacity`: of the whole buffer, in rows.
  void load_summand(Width const& width, Element const* from, int row, int capacity,
                    In* panels) const {
    for (int first = 0; first < width.dim; first += kLanes) {
      Held::load_summand(from + first, min_int(width.dim - first, kLanes), row,
                         panels + static_cast<int64_t>(first) * capacity / kSteps<In>);
    }
  }
  // The panel of operands that begins at lane `first`, and a lane of the first panels.
  In const* panel_at(Width const& width, int first, In const* panels) const {
    return panels + static_cast<int64_t>(first) * width.numbers;
  }
  In* lane_of(Width const& width, int lane, In* panels) const {
    return panels + panel_of(lane) * width.numbers + lane % kLanes;
  }
  static int64_t panel_of(int lane) { return lane - lane % kLanes; }
  // Vectors of the panel that begins at lane `first`, of `lanes` in all.
  static int vectors(int first, int lanes) {
    return (min_int(lanes - first, kLanes) + kWidth<T> - 1) / kWidth<T>;
  }

  // Hides what is not visible in a panel of scores [key][query lane] that begins at lane `first`.
  void mask(LaneWords<Row> const& rows, int first, Coord const* positions, int keys,
            T* panel) const {
    for (int key = 0; key < keys; ++key) {
      Coord const position = positions[key];
      T* const scores = panel + key * kLanes;
      for (int lane = 0; lane < kLanes; ++lane) {
        Row const row = rows.get(first + lane);
        scores[lane] = M::visible(params_, row, position) ? scores[lane] : -kInfinity<T>;
      }
    }
  }

  // A bias as a summand of raw scores. As in torch's softmax, +inf makes a row NaN.
  T raw_bias(float bias) const {
    constexpr T kEnd = kInfinity<T>;
    T const raw = static_cast<T>(bias) * static_cast<T>(kLog2e) / scale_log2_;
    bool const finite = bias - bias == 0;  // large ones stay finite
    return finite && raw == kEnd    ? kLargest<T>
           : finite && raw == -kEnd ? -kLargest<T>
           : raw == kEnd            ? static_cast<T>(__builtin_nan(""))
                                    : raw;
  }
  // Caps a panel of raw scores, and stores the derivatives by what they were, if these are wanted.
  // Not inlined: it would slow down loops without a cap.
  static __attribute__((noinline)) void cap(T raw_cap, int rows, T* panel, T* slopes = nullptr) {
    using V = Vector<T>;
    T const inverse = 1 / raw_cap;
    for (int i = 0; i < rows * kLanes / kWidth<T>; ++i) {
      V& scores = reinterpret_cast<V*>(panel)[i];
      V const quotient = tanh(scores * inverse);
      scores = quotient * raw_cap;
      if (slopes != nullptr) {
        reinterpret_cast<V*>(slopes)[i] = T(1) - quotient * quotient;
      }
    }
  }
  // From gradients of capped scores to those of the scores. Hidden pairs have none in any case:
  // their slopes may be anything.
  __attribute__((noinline)) void uncap(int rows, T const* slopes, T* gradients) const {
    for (int i = 0; i < rows * kLanes; ++i) {
      gradients[i] = gradients[i] == 0 ? 0 : gradients[i] * slopes[i];
    }
  }
  bool caps() const { return raw_cap_ != 0; }

  // All that changes a panel of raw scores [key][query lane] before the softmax. `slopes`: as in
  // cap().
  void adjust(LaneWords<Row> const& rows, float const* thresholds, int first,
              Coord const* positions, float const* biases, int keys, bool masked, T* panel,
              T* slopes = nullptr) const {
    if (caps()) {
      cap(raw_cap_, keys, panel, slopes);
    }
    if (key_bias_ != nullptr) {
      add_biases(row_threshold_ == nullptr ? nullptr : thresholds + first, biases, keys, panel);
    }
    if (masked) {
      mask(rows, first, positions, keys, panel);
    }
  }
  // Adds the biases of keys; hides keys of bias -inf, whose scores may be anything, and those below
  // the thresholds of the panel's rows, if there are any. Not inlined: it would slow down loops
  // without a bias.
  __attribute__((noinline)) void add_biases(float const* thresholds, float const* biases, int keys,
                                            T* panel) const {
    for (int key = 0; key < keys; ++key) {
      float const given = biases[key];
      T const bias = raw_bias(given);
      T* const scores = panel + key * kLanes;
      for (int lane = 0; lane < kLanes; ++lane) {
        scores[lane] = bias == -kInfinity<T> ? bias : scores[lane] + bias;
      }
      for (int lane = 0; thresholds != nullptr && lane < kLanes; ++lane) {
        scores[lane] = given >= thresholds[lane] ? scores[lane] : -kInfinity<T>;
      }
    }
  }

  FmhaProblem const& problem_;
  typename M::Params params_;  // of the selected head
  typename M::Params const& all_;
  Width const keys_wide_;    // of queries, too
  Width const values_wide_;  // of outputs, too
  T const scale_log2_;
  T const raw_cap_;
  int32_t batch_ = 0;
  int32_t head_ = 0;
  float const* key_bias_ = nullptr;  // of the selected head, as the thresholds
  float const* row_threshold_ = nullptr;
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
