#include "sparse_fmha/device/anchor_kernels.h"

namespace sparse_fmha::device {

AnchorKernels anchor_kernels() { return {anchor_means, anchor_keys, anchor_columns}; }

}  // namespace sparse_fmha::device
