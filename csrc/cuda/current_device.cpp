#include "sparse_fmha/cuda/current_device.h"

#include <stdexcept>

#ifdef SPARSE_FMHA_HAS_SM90
#include "sparse_fmha/cuda/check.h"
#endif

namespace sparse_fmha {

void make_current([[maybe_unused]] int32_t device) {
#ifdef SPARSE_FMHA_HAS_SM90
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
#else
  throw std::runtime_error("sparse_fmha: this build has no GPU kernels");
#endif
}

}  // namespace sparse_fmha
