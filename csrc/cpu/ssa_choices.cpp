// SSA's choice on the CPU: a thread chooses for a few tokens at a time.
#include "sparse_fmha/core/ssa_choices.h"

#include <algorithm>
#include <vector>

#include "sparse_fmha/cpu/dispatch.h"
#include "sparse_fmha/cpu/kernel_rows.h"
#include "sparse_fmha/cpu/ssa_isa.h"

namespace sparse_fmha {
namespace {

// Writes the `few` blocks with the largest weights, of equal ones the first.
void choose(SsaChoices const& p, double const* weights, int32_t blocks, int32_t* to) {
  std::vector<int32_t> found;
  for (int32_t block = 0; block < blocks; ++block) {
    if (weights[block] == weights[block]) {  // not NaN
      found.push_back(block);
    }
  }
  if (found.size() > static_cast<size_t>(p.few)) {
    std::nth_element(found.begin(), found.begin() + p.few, found.end(), [&](int32_t a, int32_t b) {
      return weights[a] != weights[b] ? weights[a] > weights[b] : a < b;
    });
    found.resize(p.few);
    std::sort(found.begin(), found.end());
  }
  std::fill(std::copy(found.begin(), found.end(), to), to + p.few, -1);
}

}  // namespace

void cpu_choose_ssa_blocks(SsaChoices const& p, ExecutionContext const& context) {
  cpu::SsaIsa const isa = SPARSE_FMHA_BEST_ISA(ssa(p.dtype));
  int32_t const most = max_int(1, cpu::kSsaRows / p.group());
  int32_t const parts = ceil_div(p.q_len, most);
  cpu::share(context, int64_t{p.batch} * p.heads_kv * parts, isa.scratch(p),
             [&](int64_t at, void* scratch) {
               cpu::SsaTokens item;
               item.first = static_cast<int32_t>(at % parts) * most;
               item.count = min_int(most, p.q_len - item.first);
               item.head_kv = static_cast<int32_t>(at / parts % p.heads_kv);
               item.entry = static_cast<int32_t>(at / parts / p.heads_kv);
               std::vector<double> weights(int64_t{item.count} * p.columns);
               if (p.few > 0 && p.before(item.first + item.count - 1) > 0) {
                 isa.weights(p, item, weights.data(), scratch);
               }
               for (int32_t i = 0; i < item.count; ++i) {
                 int32_t* const to = p.row(item.entry, item.head_kv, item.first + i);
                 choose(p, weights.data() + int64_t{i} * p.columns, p.before(item.first + i), to);
                 to[p.few] = p.own(item.first + i);
               }
             });
}

}  // namespace sparse_fmha
