// What a GPU of this machine runs, and on how much.
#pragma once

#include "sparse_fmha/core/arch.h"

namespace sparse_fmha {

// The answer of arch_for_call() for a device, which is queried once. Throws std::runtime_error as
// that does, if the device runs none of this build's code for the architecture, and in a build
// without GPU kernels.
Arch device_arch(int32_t device);

// The number of multiprocessors of a device, which is queried once. Throws in a build without GPU
// kernels.
int32_t device_multiprocessors(int32_t device);

// The newest CUDA that the driver knows, as CUDA counts; 0 without a driver or without GPU kernels.
int driver_version();

}  // namespace sparse_fmha
