#include "sparse_fmha/cuda/device_arch.h"

#include <algorithm>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "sparse_fmha/core/images.h"
#include "sparse_fmha/cuda/check.h"

namespace sparse_fmha {
namespace {

struct Device {
  int major;
  int minor;
  int multiprocessors;
  uint32_t runs;  // bit a: what this build has of architecture a
};

// Without errors: it is part of messages about them.
Gpu describe(int device, int major, int minor) {
  cudaDeviceProp properties;
  bool const known = cudaGetDeviceProperties(&properties, device) == cudaSuccess;
  return {"cuda:" + std::to_string(device) + " (" + (known ? properties.name : "unknown GPU") + ")",
          major, minor, driver_version()};
}

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
    Gpu const gpu{"", found[device].major, found[device].minor, driver_version()};
    for (GpuArch const& row : kGpuArchs) {
      bool const runs = why_no_image(this_build(), row.arch, gpu).empty();
      found[device].runs |= uint32_t{runs} << static_cast<int>(row.arch);
    }
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
  // A GPU that runs nothing of this build need not be told first that it is untested.
  Arch const arch =
      arch_override() ? arch_for_call(of.major, of.minor) : arch_of_capability(of.major, of.minor);
  if ((of.runs >> static_cast<int>(arch) & 1) == 0) {
    throw std::runtime_error(
        "sparse_fmha: " + why_no_image(this_build(), arch, describe(device, of.major, of.minor)));
  }
  return arch_for_call(of.major, of.minor);
}

int32_t device_multiprocessors(int32_t device) { return device_of(device).multiprocessors; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// What the table of images did not foresee, such as CUDA_DISABLE_PTX_JIT, ends here.
std::string about_images(cudaError_t status) {
  cudaError_t const about[] = {
      cudaErrorInsufficientDriver,
      cudaErrorInvalidDeviceFunction,
      cudaErrorNoKernelImageForDevice,
      cudaErrorInvalidKernelImage,
      cudaErrorInvalidPtx,
      cudaErrorUnsupportedPtxVersion,
      cudaErrorJitCompilerNotFound,
      cudaErrorJitCompilationDisabled,
  };
  if (std::find(std::begin(about), std::end(about), status) == std::end(about)) {
    return "";
  }
  std::ostringstream text;
  text << "\n";
  int device = 0;
  int major = 0;
  int minor = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess) {
    text << describe(device, major, minor).name << ", compute capability " << major << "." << minor
         << ". ";
  }
  cudaGetLastError();  // of these questions
  int const driver = driver_version();
  text << "This build has " << list_images(this_build()) << ", made by CUDA "
       << cuda_version(this_build().toolkit) << "; "
       << (driver > 0 ? "the driver knows CUDA up to " + cuda_version(driver)
                      : "no driver is found")
       << ". Install a later driver, or build with the GPU in SPARSE_FMHA_IMAGES";
  return text.str();
}

}  // namespace sparse_fmha
