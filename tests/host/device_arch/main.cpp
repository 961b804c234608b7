// What csrc/cuda/device_arch.cpp says of a GPU that is not there: the CUDA runtime's functions are
// replaced.
//
//   main MAJOR MINOR DRIVER [override ARCH | error NUMBER | count NUMBER]
//
// Prints the architecture that a call takes, or the message that is raised. `error`: of a launch
// that ends in this CUDA error; `count`: the same of counting the devices.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "sparse_fmha/cuda/check.h"
#include "sparse_fmha/cuda/device_arch.h"

namespace {
int major_;
int minor_;
int driver_;
cudaError_t counting_ = cudaSuccess;
}  // namespace

extern "C" {
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return counting_;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return counting_;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? major_
           : attribute == cudaDevAttrComputeCapabilityMinor ? minor_
                                                            : 58;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int /*device*/) {
  *properties = {};
  std::strcpy(properties->name, "NVIDIA Fake");
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
char const* cudaGetErrorString(cudaError_t /*error*/) { return "what CUDA says"; }
}

int main(int argc, char** argv) {
  using namespace sparse_fmha;
  major_ = std::atoi(argv[1]);
  minor_ = std::atoi(argv[2]);
  driver_ = std::atoi(argv[3]);
  char const* const more = argc > 5 ? argv[4] : "";
  try {
    if (std::strcmp(more, "error") == 0) {
      check_cuda(static_cast<cudaError_t>(std::atoi(argv[5])), "launching");
      return 0;
    }
    if (std::strcmp(more, "count") == 0) {
      counting_ = static_cast<cudaError_t>(std::atoi(argv[5]));
    }
    for (GpuArch const& row : kGpuArchs) {
      if (std::strcmp(more, "override") == 0 && std::strcmp(row.name, argv[5]) == 0) {
        set_arch_override(row.arch);
      }
    }
    std::puts(to_string(device_arch(0)));
  } catch (std::exception const& error) {
    std::printf("raised %s\n", error.what());
  }
}
