// Sets the GPU for driver calls.
#pragma once

#include <cstdint>

namespace sparse_fmha {

// Makes a GPU and its primary context current in the calling thread. A thread has none until its
// first call into the CUDA runtime, and driver calls, such as the encoding of a tensor map, need
// one. Throws std::runtime_error, also in a build without GPU kernels.
void make_current(int32_t device);

}  // namespace sparse_fmha
