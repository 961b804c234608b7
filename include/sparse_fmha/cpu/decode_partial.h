// Results of decode attention over a part of the keys, and how they are merged.
#pragma once

#include "sparse_fmha/cpu/decode_isa.h"
#include "sparse_fmha/cpu/tokens.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// What the passes over tokens and this one have in common, for elements of one type.
template <class Element>
struct TileMath : Tokens<Dense, Element> {
  using Base = Tokens<Dense, Element>;
  using Base::cap, Base::kLanes, Base::panel_of, Base::raw_cap, Base::scale_log2, Base::sign,
      Base::vectors;
  using typename Base::T;
};

// The result of one part of the keys: unnormalised outputs, maxima and sums of a group of rows.
template <class Element>
struct Partial {
  using T = typename TileMath<Element>::T;
  T* out;  // [row][dim]
  T* max;
  T* sum;

  Partial(FmhaProblem const& problem, void* memory) {
    int64_t const rows = rows_of(problem);
    Buffers buffers(memory);
    buffers.take(out, rows * problem.head_dim);
    buffers.take(max, rows);
    buffers.take(sum, rows);
    bytes_ = buffers.used();
  }
  static int64_t rows_of(FmhaProblem const& problem) {
    DecodeKeys const& keys = *problem.decode;
    return min_int(DecodeKeys::kRows, keys.len_q * keys.group);
  }
  static size_t bytes(FmhaProblem const& problem) { return Partial(problem, nullptr).bytes_; }

 private:
  size_t bytes_;
};

// Merges partial results in order, so that threads do not change the sums.
template <class Element>
void merge_partials(FmhaProblem const& problem, DecodeRows const& at, int64_t parts,
                    void const* partials) {
  using Math = TileMath<Element>;
  using T = typename Math::T;
  constexpr double kLn2 = 0.693147180559945309417;
  DecodeKeys const& keys = *problem.decode;
  int const dim = problem.head_dim;
  double const scale_log2 = Math::scale_log2(problem.scale);
  size_t const bytes = Partial<Element>::bytes(problem);
  auto const part_of = [&](int64_t i) {
    auto* const memory = const_cast<char*>(static_cast<char const*>(partials)) + i * bytes;
    return Partial<Element>(problem, memory);
  };
  T out[256];
  KeyRange const rows = keys.rows_of(at.row_group);
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    int32_t const r = row - rows.begin;
    T most = -kInfinity<T>;
    for (int64_t i = 0; i < parts; ++i) {
      most = max(most, part_of(i).max[r]);
    }
    std::memset(out, 0, sizeof(T) * dim);
    double sum = 0;
    for (int64_t i = 0; i < parts; ++i) {
      Partial<Element> const part = part_of(i);
      if (part.max[r] == -kInfinity<T>) {  // no key
        continue;
      }
      double const weight = __builtin_exp2((double{part.max[r]} - most) * scale_log2);
      sum += weight * part.sum[r];
      T const factor = static_cast<T>(weight);
      for (int d = 0; d < dim; ++d) {
        out[d] += factor * part.out[static_cast<int64_t>(r) * dim + d];
      }
    }
    int32_t const query = row / keys.group;
    int64_t const head = int64_t{at.head} * keys.group + row % keys.group;
    bool const empty = sum == 0;
    double lse = empty ? -kInfinity<double> : (most * scale_log2 + __builtin_log2(sum)) * kLn2;
    double factor = empty ? 0 : 1 / sum;
    if (keys.sink != nullptr) {
      double const sink = keys.sink[head * keys.sink_stride];
      double const above = max(lse, sink);
      double const total =
          above == -kInfinity<double> || above == kInfinity<double>
              ? above
              : above + __builtin_log(__builtin_exp(lse - above) + __builtin_exp(sink - above));
      factor *= empty ? 0 : __builtin_exp(lse - total);
      lse = total;
    }
    Element* const to =
        static_cast<Element*>(problem.out.data) + at.batch * problem.out.batch_stride +
        query * problem.out.axis_stride[kGridAxes - 1] + head * problem.out.head_stride;
    for (int d = 0; d < dim; ++d) {
      narrow(static_cast<T>(out[d] * static_cast<T>(factor)), to + d);
    }
    problem.lse[(int64_t{at.batch} * keys.len_q + query) * problem.heads_q + head] =
        static_cast<float>(lse);
  }
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
