// Rows of tokens that are summed with weights.
#pragma once

#include "sparse_fmha/cpu/multiply.h"
#include "sparse_fmha/cpu/tokens.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// A row that is not finite may only reach sums in which its weight is not 0. So it is 0 in the
// matrix product, and is added separately.
template <class Element>
class Summands {
  using Held = Operands<Element>;
  using T = typename Held::T;
  using In = typename Held::In;
  static constexpr int kLanes = kPanel<T>;
  static constexpr Element kZeros[kLanes] = {};

 public:
  void take(Buffers& buffers, int capacity, int dim) {
    capacity_ = capacity;
    dim_ = dim;
    numbers_ = Held::numbers(dim);
    int const panel_dim = round_up(dim, kLanes);
    buffers.take(rows_, int64_t{capacity} * numbers_);
    buffers.take(panels_, int64_t{capacity} * panel_dim / kSteps<In>);
    buffers.take(odd_, capacity);
  }
  void clear() { num_odd_ = 0; }

  // Rows are loaded in order.
  void load(Element const* from, int row) {
    Held::load_row(from, dim_, rows_ + static_cast<int64_t>(row) * numbers_);
    int odd = 0;
    for (int d = 0; d < dim_; ++d) {
      T const x = widen(from[d]);
      odd |= !(x - x == T(0));
    }
    if (odd) {
      odd_[num_odd_++] = row;
    }
    for (int first = 0; first < dim_; first += kLanes) {
      Held::load_summand(odd ? kZeros : from + first, min_int(dim_ - first, kLanes), row,
                         panel_at(first));
    }
  }

  // As operand of scores: [row][dim].
  typename Held::Left factor() const { return Held::rows(rows_, numbers_); }

  // Adds the first rows, times the weights [row][lane], to sums [lane][panel_dim]. May overwrite
  // the weights.
  void add_to(T* sums, T* weights, int lanes, int rows) const {
    int64_t const panel_dim = round_up(dim_, kLanes);
    for (int i = 0; i < num_odd_; ++i) {
      T const* const of_row = weights + odd_[i] * kLanes;
      In const* const odd = rows_ + static_cast<int64_t>(odd_[i]) * numbers_;
      for (int lane = 0; lane < lanes; ++lane) {
        T* const to = sums + lane * panel_dim;
        for (int d = 0; of_row[lane] != T(0) && d < dim_; ++d) {
          to[d] += of_row[lane] * Held::at(odd, d);
        }
      }
    }
    int const vectors = (lanes + kWidth<T> - 1) / kWidth<T>;
    auto const held = Held::as_weights(weights, rows, vectors);
    for (int d = 0; d < dim_; d += kLanes) {
      int const columns = (min_int(dim_ - d, kLanes) + kWidth<T> - 1) / kWidth<T>;
      multiply<true>(held, round_up(lanes, kPanelRows), panel_at(d), columns, rows, sums + d,
                     panel_dim);
    }
  }

 private:
  In* panel_at(int d) const { return panels_ + static_cast<int64_t>(d) * capacity_ / kSteps<In>; }

  int capacity_ = 0;
  int dim_ = 0;
  int numbers_ = 0;
  int num_odd_ = 0;
  In* rows_ = nullptr;    // [row][dim]
  In* panels_ = nullptr;  // [panel][row][dim]
  int* odd_ = nullptr;
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
