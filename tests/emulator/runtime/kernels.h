// The kernels that the loaded libraries have registered, and their launches.
#pragma once

#include <cstdint>
#include <string>

#include "../exec/launch.h"

namespace emulator {

inline constexpr uint32_t kLargestShared = 227 * 1024;  // of a block
inline constexpr uint32_t kUsualShared = 48 * 1024;     // without an attribute of the kernel

// The PTX of a fat binary. nvcc must not have compressed it. Throws Error where it has none.
std::string ptx_of(void const* fat_binary);

// A kernel: its module, its name, and the shared memory that it was allowed.
class Kernel {
 public:
  KernelAttributes attributes();
  // Throws Error where a block of it cannot have so many bytes.
  void allow_dynamic_shared(uint32_t bytes);
  uint32_t dynamic_shared() const { return dynamic_shared_; }
  // Throws Error where a GPU would refuse the launch, and if the kernel faults.
  void launch(Launch const& launch);

 private:
  friend class Registry;
  void** handle_ = nullptr;
  std::string name_;
  uint32_t dynamic_shared_ = kUsualShared;
};

// The kernel of a host function. Throws Error where it has none.
Kernel& kernel_of(void const* host_function);

}  // namespace emulator
