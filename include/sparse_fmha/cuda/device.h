// What is asked of the current GPU.
#pragma once

#include <string>

#include "sparse_fmha/cuda/check.h"

namespace sparse_fmha {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline void check_compute_capability() {
  int const major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  int const minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  if (major != 9 || minor != 0) {
    throw std::runtime_error("sparse_fmha: the GPU has compute capability " +
                             std::to_string(major) + "." + std::to_string(minor) +
                             "; the compiled kernels need 9.0");
  }
}

}  // namespace sparse_fmha
