// What is asked of the current GPU.
#pragma once

#include "sparse_fmha/cuda/check.h"

namespace sparse_fmha {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace sparse_fmha
