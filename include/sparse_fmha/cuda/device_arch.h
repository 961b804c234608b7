// Which architecture's kernels a GPU of this machine runs.
#pragma once

#include "sparse_fmha/core/arch.h"

namespace sparse_fmha {

// Each device is queried once. Throws std::runtime_error if the table in core/arch.h has no row for
// the device, and in a build without GPU kernels.
Arch device_arch(int32_t device);

}  // namespace sparse_fmha
