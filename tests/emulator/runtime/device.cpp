// The emulated GPU: an H200 with few multiprocessors, so that persistent kernels have small grids.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#include "errors.h"
#include "kernels.h"

namespace {

// SPARSE_FMHA_EMULATOR_MULTIPROCESSORS, 2 if it is not set.
int multiprocessors() {
  char const* const given = std::getenv("SPARSE_FMHA_EMULATOR_MULTIPROCESSORS");
  int const number = given == nullptr ? 2 : std::atoi(given);
  return number > 0 ? number : 2;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess
                     : emulator::fail(cudaErrorInvalidDevice, "emulator: there is one device, 0");
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t /*stream*/) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors();
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 << 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::kLargestShared;
      return cudaSuccess;
    default:
      return emulator::fail(cudaErrorInvalidValue,
                            "emulator: an attribute that runtime/device.cpp lacks");
  }
}

}  // extern "C"
