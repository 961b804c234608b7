// The table of devices, as data.
#pragma once

#include "sparse_fmha/core/arch.h"

namespace sparse_fmha {

// A compute capability and an architecture whose kernels its devices run.
struct Capability {
  int major;
  int minor;
  Arch arch;
  char const* status;  // measured, ran or compiled
  bool is_default;     // whether devices run it without being asked
};
inline constexpr Capability kCapabilities[] = {
#define SPARSE_FMHA_CAPABILITY(major, minor, enumerator, status) \
  {major, minor, Arch::enumerator, #status, true},
#define SPARSE_FMHA_OVERRIDE(major, minor, enumerator, status) \
  {major, minor, Arch::enumerator, #status, false},
#include "sparse_fmha/core/capabilities.def"
};

}  // namespace sparse_fmha
