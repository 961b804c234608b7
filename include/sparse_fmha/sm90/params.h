// What the launcher hands to the kernel.
#pragma once

#include <cuda.h>

#include "sparse_fmha/sm90/scheduler.h"

namespace sparse_fmha::sm90 {

template <class Mechanism>
struct KernelParams {
  CUtensorMap q;    // (D, Lq, Hq, B)
  CUtensorMap k;    // (D, Lkv, Hkv, B)
  CUtensorMap v;    // (D, Lkv, Hkv, B)
  CUtensorMap out;  // (D, Lq, Hq, B)
  float* lse;       // [B, Lq, Hq]
  typename Mechanism::Params sparsity;
  int32_t len_q;
  int32_t heads_q;
  int32_t heads_per_kv;  // query heads that share a key head
  float scale_log2;      // |scale| * log2(e), never zero
  bool negate;           // the scale is negative
  Scheduler scheduler;
};

}  // namespace sparse_fmha::sm90
