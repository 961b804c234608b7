// Parameters of Hopper's decode kernel.
#pragma once

#include <cuda.h>

#include "sparse_fmha/device/decode/params.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

struct KeyMaps {
  CUtensorMap k_map, v_map;  // boxes of `box` keys, if box > 0
};
struct BoxedDecodeParams : KeyMaps, DecodeParams {};

}  // namespace sparse_fmha::sm90
