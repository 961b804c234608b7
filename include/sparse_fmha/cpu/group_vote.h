// How groups of 64 rows skip key tiles: their vote, and the order in which they visit tiles.
#pragma once

#include "sparse_fmha/cpu/groups.h"
#include "sparse_fmha/cpu/tokens.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// The votes of a group, tile by tile. The rule is that of reference.skip_attention.
template <class T>
class GroupVote {
  static constexpr int kLanes = kPanel<T>;
  static constexpr double kBelowOne = 1 - 0x1p-24;

 public:
  void take(Buffers& buffers) { buffers.take(top_, kGroupRows); }

  // scale_log2: what raw scores are multiplied with.
  void begin(double threshold, T scale_log2) {
    double const bounded = threshold > 0 ? (threshold < kBelowOne ? threshold : kBelowOne) : 0;
    margin_ = static_cast<T>(__builtin_log2(bounded)) / scale_log2;
    visited_ = skipped_ = 0;
  }

  // True if no row has a score within the threshold of its largest one so far, `max`. scores_of(i)
  // are those of the panel that begins at row i, [key][row].
  template <class ScoresOf>
  bool is_left_out(ScoresOf scores_of, int keys, T const* max, int rows) {
    for (int first = 0; first < rows; first += kLanes) {
      int const vectors = (min_int(rows - first, kLanes) + kWidth<T> - 1) / kWidth<T>;
      with_vectors(vectors, [&](auto count) {
        row_tops<T, count.value>(scores_of(first), keys,
                                 reinterpret_cast<Vector<T>*>(top_ + first));
      });
    }
    bool visited = false;
    bool counts = false;
    for (int lane = 0; lane < rows; ++lane) {
      visited |= top_[lane] != -kInfinity<T>;
      // A row that has seen no key keeps any score but -inf. Every row keeps NaN.
      T const least = max[lane] + margin_;
      counts |= !(top_[lane] < (least > -kLargest<T> ? least : -kLargest<T>));
    }
    visited_ += visited;
    skipped_ += visited && !counts;
    return !counts;
  }

  int64_t visited() const { return visited_; }
  int64_t skipped() const { return skipped_; }

 private:
  T* top_ = nullptr;
  T margin_ = 0;  // ln(threshold), in raw scores
  int64_t visited_ = 0;
  int64_t skipped_ = 0;
};

// Calls load(origin, extent) and load_extra(first, most), and visit(masked) behind each tile.
template <class M, class Load, class LoadExtra, class Visit>
void walk_group(FmhaProblem const& problem, TileShape const& shape, Group<M> const& group,
                Load load, LoadExtra load_extra, Visit visit) {
  int const tile_keys = static_cast<int>(volume(shape.k));
  int const whole = problem.extra_len / tile_keys * tile_keys;
  if (whole < problem.extra_len) {
    load_extra(whole, tile_keys);
    visit(false);
  }
  group.for_each_tile(load, visit);
  for (int32_t first = 0; first < whole; first += tile_keys) {
    load_extra(first, tile_keys);
    visit(false);
  }
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
