// Programmatic dependent launch: a kernel begins while the one before it in the stream still runs.
// GPUs before Hopper have none; launches ask for none there.
#pragma once

namespace sparse_fmha::device {

__device__ __forceinline__ void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

}  // namespace sparse_fmha::device
