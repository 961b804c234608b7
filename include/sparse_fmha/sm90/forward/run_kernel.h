// The common part of every launch of a Hopper kernel.
#pragma once

#include <algorithm>
#include <cmath>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/cuda/device.h"
#include "sparse_fmha/planning/skip_bits.h"
#include "sparse_fmha/sm90/common/persistent.h"
#include "sparse_fmha/sm90/forward/kernel.h"

namespace sparse_fmha::sm90 {

// Fills in the parameters that do not depend on the geometry, and launches. `few`: as in
// prepare_persistent().
template <class Traits, class Geometry, class Mechanism>
void run_kernel(KernelParams<Geometry, Mechanism>& params, FmhaProblem const& p,
                ExecutionContext const& context, FewWaves few = {}) {
  params.heads_per_kv = p.heads_q / p.heads_kv;
  // Zero would turn the -inf of a masked score into NaN.
  params.scale_log2 = static_cast<float>(std::max(std::abs(p.scale) * M_LOG2E, 1e-30));
  params.negate = p.scale < 0;
  params.bias.keys = p.key_bias;
  params.bias.rows = p.row_threshold;
  params.soft_cap = soft_cap(p);
  SkipSizes const sizes =
      p.skip_bits == nullptr ? SkipSizes{} : skip_sizes(p, Traits::kTileK, Traits::kHeadDim);
  params.skip = {p.skip_threshold, reinterpret_cast<unsigned long long*>(p.skip_counts),
                 p.heads_q,        sizes.groups,
                 sizes.words,      p.skip_bits};

  launch_persistent<kBlockThreads<Traits, Geometry>, sizeof(SharedStorage<Traits, Geometry>),
                    Traits::kBlocks>(&attention_kernel<Traits, Geometry, Mechanism>, params,
                                     context, "launching the attention kernel", few);
}

}  // namespace sparse_fmha::sm90
