#include "sparse_fmha/cuda/device_arch.h"

#include <vector>

#include "sparse_fmha/cuda/check.h"

namespace sparse_fmha {
namespace {

struct Device {
  int major;
  int minor;
  int multiprocessors;
};

std::vector<Device> query_devices() {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  std::vector<Device> found(count);
  for (int device = 0; device < count; ++device) {
    auto ask = [&](int& value, cudaDeviceAttr attribute) {
      check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    };
    ask(found[device].major, cudaDevAttrComputeCapabilityMajor);
    ask(found[device].minor, cudaDevAttrComputeCapabilityMinor);
    ask(found[device].multiprocessors, cudaDevAttrMultiProcessorCount);
  }
  return found;
}

Device const& device_of(int32_t device) {
  static std::vector<Device> const devices = query_devices();
  return devices.at(device);
}

}  // namespace

Arch device_arch(int32_t device) {
  Device const& of = device_of(device);
  return arch_for_call(of.major, of.minor);
}

int32_t device_multiprocessors(int32_t device) { return device_of(device).multiprocessors; }

}  // namespace sparse_fmha
