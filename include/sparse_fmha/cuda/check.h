// CUDA errors as exceptions. Without torch.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace sparse_fmha {

// What a message about an error adds if it means that the GPU runs none of the library's code, or
// that the driver is too old for it: the GPU, the driver, the images, and what to do. Else empty.
std::string about_images(cudaError_t status);

inline void check_cuda(cudaError_t status, char const* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("sparse_fmha: ") + what + ": " +
                             cudaGetErrorString(status) + about_images(status));
  }
}

inline void check_cuda(CUresult status, char const* what) {
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(std::string("sparse_fmha: ") + what + ": CUDA driver error " +
                             std::to_string(static_cast<int>(status)));
  }
}

}  // namespace sparse_fmha
