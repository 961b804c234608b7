// PyTorch's current CUDA stream, without linking a CUDA build of PyTorch.
#pragma once

#include <cstdint>

namespace sparse_fmha {

// A cudaStream_t. Throws if no CUDA build of torch is loaded.
void* current_cuda_stream(int32_t device);

}  // namespace sparse_fmha
