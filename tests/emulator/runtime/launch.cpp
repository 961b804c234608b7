// Kernel launches. A launch returns when the kernel has ended.
#include <cuda_runtime_api.h>

#include <atomic>
#include <vector>

#include "errors.h"
#include "kernels.h"

namespace {

using emulator::guarded;

struct Configuration {
  dim3 grid;
  dim3 block;
  size_t shared;
  cudaStream_t stream;
};

thread_local std::vector<Configuration> configurations;
std::atomic<int64_t> launches{0};

emulator::Dim3 extent(dim3 const& of) { return {of.x, of.y, of.z}; }

cudaError_t run(void const* function, emulator::Launch const& launch) {
  ++launches;
  return guarded(cudaErrorLaunchFailure, [&] { emulator::kernel_of(function).launch(launch); });
}

}  // namespace

extern "C" {

// For tests: kernels launched so far.
int64_t emulator_launches() { return launches; }

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) {
    return emulator::fail(cudaErrorMissingConfiguration, "emulator: a launch without <<<...>>>");
  }
  Configuration const last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(void const* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t /*stream*/) {
  emulator::Launch launch;
  launch.grid = extent(grid);
  launch.block = extent(block);
  launch.dynamic_shared = static_cast<uint32_t>(shared);
  launch.arguments = arguments;
  return run(function, launch);
}

// A kernel's handle is its host function.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, void const* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

// Of the attributes, clusters alone matter: a kernel starts when the one before has ended.
cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t const* config, void const* function,
                                void** arguments) {
  emulator::Launch launch;
  launch.grid = extent(config->gridDim);
  launch.block = extent(config->blockDim);
  launch.dynamic_shared = static_cast<uint32_t>(config->dynamicSmemBytes);
  launch.arguments = arguments;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    cudaLaunchAttribute const& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      auto const& cluster = attribute.val.clusterDim;
      launch.cluster = {cluster.x, cluster.y, cluster.z};
    }
  }
  return run(function, launch);
}

cudaError_t cudaFuncSetAttribute(void const* function, cudaFuncAttribute attribute, int value) {
  return guarded(cudaErrorInvalidValue, [&] {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
      emulator::kernel_of(function).allow_dynamic_shared(static_cast<uint32_t>(value));
    }
  });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void const* function) {
  return guarded(cudaErrorInvalidValue, [&] {
    emulator::Kernel& kernel = emulator::kernel_of(function);
    emulator::KernelAttributes const found = kernel.attributes();
    *attributes = {};
    attributes->sharedSizeBytes = found.static_shared;
    attributes->localSizeBytes = found.local;
    attributes->maxThreadsPerBlock = static_cast<int>(found.max_threads);
    attributes->maxDynamicSharedSizeBytes = static_cast<int>(kernel.dynamic_shared());
  });
}

}  // extern "C"
