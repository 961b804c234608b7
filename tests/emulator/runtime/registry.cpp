// What the code that nvcc generates calls when a library is loaded.
#include <cuda_runtime_api.h>

#include <deque>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "errors.h"
#include "kernels.h"

namespace emulator {

// A fat binary, whose PTX is read when one of its kernels is first used.
struct Binary {
  void const* fat_binary;
  std::unique_ptr<Module> module;
};

class Registry {
 public:
  static Registry& instance() {
    static Registry* const registry = new Registry;  // outlives the libraries that unregister
    return *registry;
  }

  void** add(void const* fat_binary) {
    std::lock_guard<std::recursive_mutex> const lock(mutex);
    binaries_.push_back({fat_binary, nullptr});
    return reinterpret_cast<void**>(&binaries_.back());
  }

  void add_kernel(void** handle, void const* host_function, char const* name) {
    std::lock_guard<std::recursive_mutex> const lock(mutex);
    Kernel& kernel = kernels_[host_function];
    kernel.handle_ = handle;
    kernel.name_ = name;
  }

  Kernel& kernel(void const* host_function) {
    std::lock_guard<std::recursive_mutex> const lock(mutex);
    auto const found = kernels_.find(host_function);
    if (found == kernels_.end()) {
      throw Error("emulator: no kernel was registered for a host function");
    }
    return found->second;
  }

  Module& module(void** handle) {
    Binary& binary = *reinterpret_cast<Binary*>(handle);
    if (!binary.module) {
      binary.module = std::make_unique<Module>(ptx_of(binary.fat_binary));
    }
    return *binary.module;
  }

  std::recursive_mutex mutex;  // held while a kernel runs, too

 private:
  std::deque<Binary> binaries_;
  std::unordered_map<void const*, Kernel> kernels_;
};

Kernel& kernel_of(void const* host_function) { return Registry::instance().kernel(host_function); }

KernelAttributes Kernel::attributes() {
  Registry& registry = Registry::instance();
  std::lock_guard<std::recursive_mutex> const lock(registry.mutex);
  return registry.module(handle_).attributes(name_);
}

void Kernel::allow_dynamic_shared(uint32_t bytes) {
  uint32_t const own = attributes().static_shared;
  if (bytes + own > kLargestShared) {
    throw Error("emulator: " + name_ + " cannot have " + std::to_string(bytes) +
                " bytes of dynamic shared memory besides its " + std::to_string(own));
  }
  dynamic_shared_ = bytes;
}

void Kernel::launch(Launch const& launch) {
  Registry& registry = Registry::instance();
  std::lock_guard<std::recursive_mutex> const lock(registry.mutex);
  Module& module = registry.module(handle_);
  auto check = [&](bool holds, char const* what) {
    if (!holds) {
      throw Error("emulator: " + name_ + " cannot be launched: " + what);
    }
  };
  check(launch.grid.count() > 0 && launch.grid.x <= INT32_MAX && launch.grid.y <= 65535 &&
            launch.grid.z <= 65535,
        "its grid is empty or too large");
  check(launch.block.count() > 0 && launch.block.count() <= module.attributes(name_).max_threads,
        "its blocks have no threads or too many");
  check(launch.dynamic_shared <= dynamic_shared_,
        "more dynamic shared memory than cudaFuncAttributeMaxDynamicSharedMemorySize");
  check(launch.grid.x % launch.cluster.x == 0 && launch.grid.y % launch.cluster.y == 0 &&
            launch.grid.z % launch.cluster.z == 0,
        "its grid is no whole number of clusters");
  emulator::launch(module, name_, launch);
}

}  // namespace emulator

extern "C" {

void** __cudaRegisterFatBinary(void* fat_binary) {
  return emulator::Registry::instance().add(fat_binary);
}

void __cudaRegisterFatBinaryEnd(void** /*handle*/) {}

void __cudaUnregisterFatBinary(void** /*handle*/) {}

void __cudaRegisterFunction(void** handle, char const* host_function, char* /*device_function*/,
                            char const* name, int /*thread_limit*/, uint3* /*thread*/,
                            uint3* /*block*/, dim3* /*block_dim*/, dim3* /*grid_dim*/,
                            int* /*warp_size*/) {
  emulator::Registry::instance().add_kernel(handle, host_function, name);
}

// No host code reads or writes a variable of a kernel by its symbol.
void __cudaRegisterVar(void** /*handle*/, char* /*host*/, char* /*device*/, char const* /*name*/,
                       int /*ext*/, size_t /*size*/, int /*constant*/, int /*global*/) {}

char __cudaInitModule(void** /*handle*/) { return 1; }

}  // extern "C"
