// Which architecture's kernels a device runs. Its compute capability decides, by the table in
// capabilities.def, unless another architecture of the table is asked for (tests and benchmarks).
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace sparse_fmha {

enum class Arch : int32_t {
  kCpu,
#define SPARSE_FMHA_ARCH(enumerator, name, nvcc, family) enumerator,
#include "sparse_fmha/core/archs.def"
};

// A row of the table of architectures, which does not include the CPU.
struct GpuArch {
  Arch arch;
  char const* name;
  char const* nvcc;  // as in SPARSE_FMHA_ARCHS
};
inline constexpr GpuArch kGpuArchs[] = {
#define SPARSE_FMHA_ARCH(enumerator, name, nvcc, family) {Arch::enumerator, #name, #nvcc},
#include "sparse_fmha/core/archs.def"
};

// nullptr: the CPU.
GpuArch const* gpu_arch_of(Arch arch);
char const* to_string(Arch arch);

// The architecture that devices of a compute capability run. Throws std::runtime_error that names
// the capability and the supported ones.
Arch arch_of_capability(int major, int minor);

// The architecture whose kernels a call on such a device takes: the override if there is one. What
// was never run on such devices is refused unless it is allowed or the override. Throws
// std::runtime_error.
Arch arch_for_call(int major, int minor);

// For the whole process, because gradients are computed in other threads. nullopt: the table
// decides. Returns the override before.
std::optional<Arch> set_arch_override(std::optional<Arch> arch);
std::optional<Arch> arch_override();

// Lets calls take kernels that were never run on their device. SPARSE_FMHA_ALLOW_UNTESTED=1 in the
// environment does the same.
void allow_untested(bool allow);

// The architectures that can be built, as SPARSE_FMHA_ARCHS lists them.
std::string buildable_archs();

}  // namespace sparse_fmha
