// Which architecture's kernels a device runs. Only its compute capability decides, by the table in
// archs.def.
#pragma once

#include <cstdint>
#include <string>

namespace sparse_fmha {

enum class Arch : int32_t {
  kCpu,
#define SPARSE_FMHA_ARCH(enumerator, name, nvcc) enumerator,
#include "sparse_fmha/core/archs.def"
};

// A row of the table of architectures, which does not include the CPU.
struct GpuArch {
  Arch arch;
  char const* name;
  char const* nvcc;  // nvcc's target, as in SPARSE_FMHA_ARCHS
};
inline constexpr GpuArch kGpuArchs[] = {
#define SPARSE_FMHA_ARCH(enumerator, name, nvcc) {Arch::enumerator, #name, #nvcc},
#include "sparse_fmha/core/archs.def"
};

// A row of the table of devices.
struct Capability {
  int major;
  int minor;
  Arch arch;
};
inline constexpr Capability kCapabilities[] = {
#define SPARSE_FMHA_CAPABILITY(major, minor, enumerator) {major, minor, Arch::enumerator},
#include "sparse_fmha/core/archs.def"
};

char const* to_string(Arch arch);

// Throws std::runtime_error that names the capability and the supported ones.
Arch arch_of_capability(int major, int minor);

// The architectures that can be built, as SPARSE_FMHA_ARCHS lists them.
std::string buildable_archs();

}  // namespace sparse_fmha
