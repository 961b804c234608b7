// What quest_pages_isa.cpp has for each instruction set.
#pragma once

#include "sparse_fmha/core/quest_pages.h"

namespace sparse_fmha::cpu {

struct QuestIsa {
  // Of the query heads of a key head: in each dimension the sum of those above zero, and of those
  // below it. By q's dtype.
  void (*sums)(QuestPages const&, int32_t entry, int32_t head_kv, double* above, double* below);
  // The scores of a request's pages [0, count). By the dtype of the bounds.
  void (*scores)(QuestPages const&, int32_t entry, int32_t head_kv, int32_t count,
                 double const* above, double const* below, float* to);
};

namespace baseline {
QuestIsa quest(DataType q_dtype, DataType dtype);
}  // namespace baseline
namespace avx2 {
QuestIsa quest(DataType q_dtype, DataType dtype);
}  // namespace avx2
namespace avx512 {
QuestIsa quest(DataType q_dtype, DataType dtype);
}  // namespace avx512

}  // namespace sparse_fmha::cpu
