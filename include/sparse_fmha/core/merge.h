// The merge of attention over parts of the keys, as plain data:
// out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i).
#pragma once

#include <cmath>

#include "sparse_fmha/core/arch.h"
#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

struct ExecutionContext;  // registry.h

// Rows are numbered by dimensions 0 (the fastest) to dims - 1. Strides are in elements; a row's
// elements are consecutive.
struct MergeProblem {
  static constexpr int32_t kMostParts = 32;
  static constexpr int32_t kMostDims = 5;

  struct Part {
    void const* out;
    float const* lse;
    int64_t out_stride[kMostDims];
    int64_t lse_stride[kMostDims];
  };

  DataType dtype;  // of out; sums are fp32, or fp64 for fp64
  int32_t count;   // of parts
  int32_t dims;
  int32_t head_dim;
  int32_t size[kMostDims];
  int64_t out_stride[kMostDims];
  void* out;   // may be the first part's; no other part overlaps it
  float* lse;  // [rows], in the order of their numbers
  Part parts[kMostParts];

  SPARSE_FMHA_HD int64_t rows() const {
    int64_t product = 1;
    for (int32_t d = 0; d < dims; ++d) {
      product *= size[d];
    }
    return product;
  }
};
static_assert(sizeof(MergeProblem) <= 4096, "kernels take it as a parameter");

// Where a row is. Most problems have one or two dimensions, so the others are branched around.
class MergeRow {
 public:
  SPARSE_FMHA_HD MergeRow(MergeProblem const& p, uint32_t row) : dims_(p.dims) {
    for (int d = 0; d < MergeProblem::kMostDims; ++d) {
      at_[d] = row;
      if (d + 1 < p.dims) {
        auto const size = static_cast<uint32_t>(p.size[d]);
        at_[d] = row % size;
        row /= size;
      }
    }
  }
  SPARSE_FMHA_HD int64_t offset(int64_t const (&stride)[MergeProblem::kMostDims]) const {
    int64_t sum = 0;
    for (int d = 0; d < MergeProblem::kMostDims; ++d) {
      if (d < dims_) {
        sum += at_[d] * stride[d];
      }
    }
    return sum;
  }

 private:
  int32_t dims_;
  uint32_t at_[MergeProblem::kMostDims];
};

// A row's lse, of which parts have the weights exp(lse_i - lse). A part with the weight 0 must not
// be read: it may hold anything. lse_of(i) is the lse of part i.
template <class T, class LseOf>
SPARSE_FMHA_HD T merged_lse(int32_t count, LseOf const& lse_of) {
  T const infinity = static_cast<T>(INFINITY);
  T top = -infinity;
  for (int32_t i = 0; i < count; ++i) {
    T const x = lse_of(i);
    top = x > top ? x : top;
  }
  if (!(top > -infinity && top < infinity)) {
    top = 0;  // what is NaN or +inf stays so, and all -inf give -inf
  }
  T sum = 0;
  for (int32_t i = 0; i < count; ++i) {
    sum += std::exp(lse_of(i) - top);
  }
  return top + std::log(sum);
}
template <class T>
SPARSE_FMHA_HD T merge_weight(T lse, T of_part) {
  return of_part == -static_cast<T>(INFINITY) ? T{0} : std::exp(of_part - lse);
}

// Runs on the current device and the context's stream, or on the context's threads. Throws
// std::runtime_error if this build has no kernel for the architecture.
void merge_parts(Arch arch, MergeProblem const& problem, ExecutionContext const& context);

}  // namespace sparse_fmha
