#include "sparse_fmha/cuda/device_arch.h"

#include <vector>

#include "sparse_fmha/cuda/check.h"

namespace sparse_fmha {
namespace {

struct Version {
  int major;
  int minor;
};

std::vector<Version> compute_capabilities() {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  std::vector<Version> found(count);
  for (int device = 0; device < count; ++device) {
    auto ask = [&](int& value, cudaDeviceAttr attribute) {
      check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    };
    ask(found[device].major, cudaDevAttrComputeCapabilityMajor);
    ask(found[device].minor, cudaDevAttrComputeCapabilityMinor);
  }
  return found;
}

}  // namespace

Arch device_arch(int32_t device) {
  static std::vector<Version> const versions = compute_capabilities();
  Version const version = versions.at(device);
  return arch_for_call(version.major, version.minor);
}

}  // namespace sparse_fmha
