// Rows of tokens that are summed with weights.
#pragma once

#include "sparse_fmha/cpu/multiply.h"
#include "sparse_fmha/cpu/tokens.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// A row that is not finite may only reach sums in which its weight is not 0. So it is 0 in the
// matrix product, and is added separately.
template <class T>
class Summands {
  static constexpr int kLanes = kPanel<T>;

 public:
  void take(Buffers& buffers, int capacity, int dim) {
    capacity_ = capacity;
    dim_ = dim;
    panel_dim_ = round_up(dim, kLanes);
    buffers.take(rows_, int64_t{capacity} * dim);
    buffers.take(panels_, int64_t{capacity} * panel_dim_);
    buffers.take(odd_, capacity);
  }
  void clear() { num_odd_ = 0; }

  template <class Element>
  void load(Element const* from, int row) {
    T* const whole = rows_ + static_cast<int64_t>(row) * dim_;
    widen_row(from, dim_, whole);
    int odd = 0;
    for (int d = 0; d < dim_; ++d) {
      odd |= !(whole[d] - whole[d] == T(0));
    }
    if (odd) {
      odd_[num_odd_++] = row;
    }
    for (int first = 0; first < dim_; first += kLanes) {
      T* const to = panels_ + static_cast<int64_t>(first) * capacity_ + row * kLanes;
      size_t const bytes = sizeof(T) * min_int(dim_ - first, kLanes);
      if (odd) {
        std::memset(to, 0, bytes);
      } else {
        std::memcpy(to, whole + first, bytes);
      }
    }
  }

  // As operand of scores: [row][dim].
  Factor<T> factor() const { return {rows_, dim_, 1}; }
  T const* row(int row) const { return rows_ + static_cast<int64_t>(row) * dim_; }

  // Adds the first rows, times the weights [row][lane], to sums [lane][panel_dim].
  void add_to(T* sums, T const* weights, int lanes, int rows) const {
    for (int d = 0; d < dim_; d += kLanes) {
      int const columns = (min_int(dim_ - d, kLanes) + kWidth<T> - 1) / kWidth<T>;
      multiply<true>(Factor<T>{weights, 1, kLanes}, round_up(lanes, kPanelRows),
                     panels_ + static_cast<int64_t>(d) * capacity_, columns, rows, sums + d,
                     panel_dim_);
    }
    for (int i = 0; i < num_odd_; ++i) {
      T const* const of_row = weights + odd_[i] * kLanes;
      for (int lane = 0; lane < lanes; ++lane) {
        T* const to = sums + static_cast<int64_t>(lane) * panel_dim_;
        for (int d = 0; of_row[lane] != T(0) && d < dim_; ++d) {
          to[d] += of_row[lane] * row(odd_[i])[d];
        }
      }
    }
  }

 private:
  int capacity_ = 0;
  int dim_ = 0;
  int panel_dim_ = 0;
  int num_odd_ = 0;
  T* rows_ = nullptr;    // [row][dim]
  T* panels_ = nullptr;  // [panel][row][dim]
  int* odd_ = nullptr;
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
