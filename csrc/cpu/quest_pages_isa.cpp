// The scores of Quest's choice on the CPU, compiled once per instruction set (for the requirements
// see attend_isa.cpp).
#include "sparse_fmha/core/config.h"
#undef SPARSE_FMHA_HD
#define SPARSE_FMHA_HD inline __attribute__((always_inline))

#include "sparse_fmha/core/quest_pages.h"
#include "sparse_fmha/cpu/element.h"
#include "sparse_fmha/cpu/quest_isa.h"
#include "sparse_fmha/cpu/with_element.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {
namespace {

template <class Element>
void sum_queries(QuestPages const& p, int32_t entry, int32_t head_kv, double* above,
                 double* below) {
  for (int32_t d = 0; d < p.head_dim; ++d) {
    above[d] = below[d] = 0;
  }
  for (int32_t i = 0; i < p.group(); ++i) {
    Element const* const row =
        static_cast<Element const*>(p.q.data) + p.query(entry, int64_t{head_kv} * p.group() + i);
    for (int32_t d = 0; d < p.head_dim; ++d) {
      double const x = static_cast<double>(widen(row[d]));
      above[d] += x < 0 ? 0 : x;  // and NaN
      below[d] += x < 0 ? x : 0;
    }
  }
}

template <class Element>
void score(QuestPages const& p, int32_t entry, int32_t head_kv, int32_t count, double const* above,
           double const* below, float* to) {
  using T = typename ComputeOf<Element>::type;
  constexpr int32_t kLanes = 8;  // head dims are multiples of it
  for (int32_t i = 0; i < count; ++i) {
    int32_t const place = p.place(entry, i);
    if (place < 0) {
      to[i] = -__builtin_inff();
      continue;
    }
    Element const* const low = p.row<Element>(p.low, place, head_kv);
    Element const* const high = p.row<Element>(p.high, place, head_kv);
    T sums[kLanes] = {};
    for (int32_t first = 0; first < p.head_dim; first += kLanes) {
      for (int32_t j = 0; j < kLanes; ++j) {
        int32_t const d = first + j;
        sums[j] +=
            static_cast<T>(above[d]) * widen(high[d]) + static_cast<T>(below[d]) * widen(low[d]);
      }
    }
    T sum = 0;
    for (T one : sums) {
      sum += one;
    }
    to[i] = static_cast<float>(sum);
  }
}

}  // namespace

QuestIsa quest(DataType q_dtype, DataType dtype) {
  return {with_element(q_dtype, [](auto element) { return &sum_queries<decltype(element)>; }),
          with_element(dtype, [](auto element) { return &score<decltype(element)>; })};
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
