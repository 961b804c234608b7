// Cached per-device properties and one-time setup of the current GPU.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "sparse_fmha/cuda/check.h"

namespace sparse_fmha {

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline constexpr int kMaxDevices = 64;  // whose properties are cached

// A property of the current GPU, queried once.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  static std::array<std::atomic<int>, kMaxDevices> kept;  // zero: not queried yet
  int const device = current_device();
  int value = device < kMaxDevices ? kept[device].load(std::memory_order_relaxed) : 0;
  if (value == 0) {
    check_cuda(cudaDeviceGetAttribute(&value, kAttribute, device), "cudaDeviceGetAttribute");
    if (device < kMaxDevices) {
      kept[device].store(value, std::memory_order_relaxed);
    }
  }
  return value;
}

// Number of multiprocessors of the current GPU.
inline int multiprocessor_count() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }
inline int l2_cache_bytes() { return device_attribute<cudaDevAttrL2CacheSize>(); }

// Runs something on the current GPU unless it has already run there. Threads may run it twice.
class OncePerDevice {
 public:
  template <class Body>
  void operator()(Body const& body) {
    int const device = current_device();
    uint64_t const bit = device < kMaxDevices ? uint64_t{1} << device : 0;
    if ((done_.load(std::memory_order_relaxed) & bit) == 0) {
      body();
      done_.fetch_or(bit, std::memory_order_relaxed);
    }
  }

 private:
  std::atomic<uint64_t> done_{0};  // one bit per device
};

}  // namespace sparse_fmha
