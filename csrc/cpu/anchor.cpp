// AnchorAttention's choice of keys on the CPU: dispatch of its items to all threads.
#include "sparse_fmha/core/anchor.h"

#include "sparse_fmha/cpu/dispatch.h"
#include "sparse_fmha/cpu/isa.h"
#include "sparse_fmha/cpu/kernel_rows.h"

namespace sparse_fmha {
namespace {

void means(AnchorMeans const& p, ExecutionContext const& context) {
  cpu::AnchorIsa const isa = SPARSE_FMHA_BEST_ISA(anchor(p.dtype));
  int64_t const items = int64_t{p.batch} * p.heads_q * p.grid.blocks();
  cpu::share(context, items, isa.means_scratch(p),
             [&](int64_t item, void* scratch) { isa.means(p, items - 1 - item, scratch); });
}

void keys(AnchorKeys const& p, ExecutionContext const& context) {
  cpu::AnchorIsa const isa = SPARSE_FMHA_BEST_ISA(anchor(p.dtype));
  int64_t const items = int64_t{p.batch} * p.heads_q * p.grid.superblocks();
  cpu::share(context, items, isa.keys_scratch(p),
             [&](int64_t item, void* scratch) { isa.keys(p, items - 1 - item, scratch); });
}

void columns(AnchorColumns const& p, ExecutionContext const& context) {
  cpu::share(context, p.lists, 0, [&](int64_t list, void*) {
    int32_t* const to = p.columns + list * p.width;
    int32_t count = 0;
    for (int32_t word = 0; word < p.words; ++word) {
      for (uint32_t bits = p.bits[list * p.words + word]; bits != 0 && count < p.width;
           bits &= bits - 1) {
        to[count++] = p.first + word * 32 + __builtin_ctz(bits);
      }
    }
    p.counts[list] = count;
    for (int32_t i = count; i < p.width; ++i) {
      to[i] = -1;
    }
  });
}

}  // namespace

AnchorKernels cpu_anchor_kernels() { return {means, keys, columns}; }

}  // namespace sparse_fmha
