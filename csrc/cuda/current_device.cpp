#include "sparse_fmha/cuda/current_device.h"

#include "sparse_fmha/cuda/check.h"

namespace sparse_fmha {

void make_current(int32_t device) { check_cuda(cudaSetDevice(device), "cudaSetDevice"); }

}  // namespace sparse_fmha
