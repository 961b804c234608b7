// CUDA errors as exceptions. Header-only, without torch.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace sparse_fmha {

inline void check_cuda(cudaError_t status, char const* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("sparse_fmha: ") + what + ": " +
                             cudaGetErrorString(status));
  }
}

inline void check_cuda(CUresult status, char const* what) {
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(std::string("sparse_fmha: ") + what + ": CUDA driver error " +
                             std::to_string(static_cast<int>(status)));
  }
}

}  // namespace sparse_fmha
