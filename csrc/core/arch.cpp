#include "sparse_fmha/core/arch.h"

#include <sstream>
#include <stdexcept>

namespace sparse_fmha {

char const* to_string(Arch arch) {
  for (GpuArch const& row : kGpuArchs) {
    if (row.arch == arch) {
      return row.name;
    }
  }
  return "cpu";
}

Arch arch_of_capability(int major, int minor) {
  for (Capability const& row : kCapabilities) {
    if (row.major == major && row.minor == minor) {
      return row.arch;
    }
  }
  std::ostringstream message;
  message << "sparse_fmha: compute capability " << major << "." << minor
          << " is not supported. Supported are:";
  for (Capability const& row : kCapabilities) {
    message << "\n  " << row.major << "." << row.minor << " (" << to_string(row.arch) << ")";
  }
  throw std::runtime_error(message.str());
}

std::string buildable_archs() {
  std::string list;
  for (GpuArch const& row : kGpuArchs) {
    list += std::string(list.empty() ? "" : ",") + row.nvcc;
  }
  return list;
}

}  // namespace sparse_fmha
