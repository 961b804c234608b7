// Parameters of a decode kernel of few rows.
#pragma once

#include "sparse_fmha/sm90/decode/params.h"

namespace sparse_fmha::sm90 {

struct FewRowsParams : BoxedDecodeParams {
  int32_t blocks;    // of each group: those of a cluster
  int32_t box_log2;  // of `box`
};

}  // namespace sparse_fmha::sm90
