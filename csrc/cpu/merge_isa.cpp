// The merge of attention over parts of the keys, compiled once per instruction set (for the
// requirements see attend_isa.cpp).
#include "sparse_fmha/core/config.h"
#undef SPARSE_FMHA_HD
#define SPARSE_FMHA_HD inline __attribute__((always_inline))

#include "sparse_fmha/core/merge.h"
#include "sparse_fmha/cpu/element.h"
#include "sparse_fmha/cpu/merge_isa.h"
#include "sparse_fmha/cpu/with_element.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {
namespace {

template <class Element>
void merge(MergeProblem const& p, int64_t first, int64_t last) {
  using T = typename ComputeOf<Element>::type;
  constexpr int32_t kColumns = 64;  // at a time
  for (int64_t row = first; row < last; ++row) {
    MergeRow const at(p, static_cast<uint32_t>(row));
    T weights[MergeProblem::kMostParts];
    auto const lse_of = [&](int32_t i) {
      return static_cast<T>(p.parts[i].lse[at.offset(p.parts[i].lse_stride)]);
    };
    T const lse = merged_lse<T>(p.count, lse_of);
    for (int32_t i = 0; i < p.count; ++i) {
      weights[i] = merge_weight(lse, lse_of(i));
    }
    p.lse[row] = static_cast<float>(lse);
    Element* const to = static_cast<Element*>(p.out) + at.offset(p.out_stride);
    for (int32_t begin = 0; begin < p.head_dim; begin += kColumns) {
      int32_t const count = min_int(kColumns, p.head_dim - begin);
      T sum[kColumns] = {};
      for (int32_t i = 0; i < p.count; ++i) {
        if (weights[i] != 0) {
          Element const* const from = static_cast<Element const*>(p.parts[i].out) +
                                      at.offset(p.parts[i].out_stride) + begin;
          for (int32_t d = 0; d < count; ++d) {
            sum[d] += weights[i] * widen(from[d]);
          }
        }
      }
      for (int32_t d = 0; d < count; ++d) {
        narrow(sum[d], to + begin + d);
      }
    }
  }
}

}  // namespace

MergeRows merge_rows(DataType dtype) {
  return with_element(dtype, [](auto element) -> MergeRows { return &merge<decltype(element)>; });
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
