// The cap of the scores of a tile, before its mask: the tanh of -inf is -1.
#pragma once

#include "sparse_fmha/device/decode/params.h"
#include "sparse_fmha/device/soft_cap.h"

namespace sparse_fmha::device {

// A branch that all threads take alike. Scores become quotients of the capped ones and the cap,
// which params.scale_log2 has.
template <class Scores>
__device__ __forceinline__ void cap_scores(DecodeParams const& params, Scores& scores) {
  if (params.tanh_scale != 0.f) {
    tanh_scores(scores, params.tanh_scale);
  }
}

}  // namespace sparse_fmha::device
