// Quest's choice on the CPU: a thread chooses for a whole request and key head.
#include "sparse_fmha/core/quest_pages.h"

#include <algorithm>
#include <vector>

#include "sparse_fmha/cpu/dispatch.h"
#include "sparse_fmha/cpu/kernel_rows.h"
#include "sparse_fmha/cpu/quest_isa.h"

namespace sparse_fmha {
namespace {

void choose(QuestPages const& p, int64_t list, int32_t newest) {
  float const* const scores = p.scores + list * p.width;
  std::vector<int32_t> found;
  for (int32_t i = 0; i < newest; ++i) {
    if (scores[i] > -__builtin_inff()) {  // nor NaN
      found.push_back(i);
    }
  }
  if (found.size() > static_cast<size_t>(p.best)) {
    std::nth_element(found.begin(), found.begin() + p.best, found.end(), [&](int32_t a, int32_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    });
    found.resize(p.best);
    std::sort(found.begin(), found.end());
  }
  int32_t* const to = p.indices + list * (int64_t{p.best} + 1);
  to[0] = newest;
  std::fill(std::copy(found.begin(), found.end(), to + 1), to + 1 + p.best, -1);
  p.counts[list] = static_cast<int32_t>(found.size()) + (newest >= 0 ? 1 : 0);
}

}  // namespace

void cpu_choose_quest_pages(QuestPages const& p, ExecutionContext const& context) {
  cpu::QuestIsa const isa = SPARSE_FMHA_BEST_ISA(quest(p.q_dtype, p.dtype));
  cpu::share(context, int64_t{p.batch} * p.heads_kv, 2 * p.head_dim * sizeof(double),
             [&](int64_t list, void* scratch) {
               auto const entry = static_cast<int32_t>(list / p.heads_kv);
               auto const head_kv = static_cast<int32_t>(list % p.heads_kv);
               int32_t const newest = p.newest(entry);
               double* const above = static_cast<double*>(scratch);
               double* const below = above + p.head_dim;
               isa.sums(p, entry, head_kv, above, below);
               isa.scores(p, entry, head_kv, newest, above, below, p.scores + list * p.width);
               choose(p, list, newest);
             });
}

}  // namespace sparse_fmha
