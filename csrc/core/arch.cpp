#include "sparse_fmha/core/arch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "sparse_fmha/core/capabilities.h"

namespace sparse_fmha {
namespace {

constexpr int32_t kNoOverride = -1;
std::atomic<int32_t> override_{kNoOverride};
std::atomic<bool> untested_{false};

bool is_set(char const* variable) {
  char const* const value = std::getenv(variable);
  return value != nullptr && *value != 0 && std::strcmp(value, "0") != 0;
}

bool allows_untested() {
  static bool const by_environment = is_set("SPARSE_FMHA_ALLOW_UNTESTED");
  return by_environment || untested_.load(std::memory_order_relaxed);
}

Capability const* row_of(int major, int minor, std::optional<Arch> arch) {
  for (Capability const& row : kCapabilities) {
    bool const wanted = arch ? row.arch == *arch : row.is_default;
    if (row.major == major && row.minor == minor && wanted) {
      return &row;
    }
  }
  return nullptr;
}

// The devices of the table with the architecture of each; those that run it by an override are in
// the list if `overrides`.
std::string listed(bool overrides) {
  std::ostringstream list;
  for (Capability const& row : kCapabilities) {
    if (row.is_default || overrides) {
      list << "\n  " << row.major << "." << row.minor << " (" << to_string(row.arch) << ")";
    }
  }
  return list.str();
}

}  // namespace

GpuArch const* gpu_arch_of(Arch arch) {
  for (GpuArch const& row : kGpuArchs) {
    if (row.arch == arch) {
      return &row;
    }
  }
  return nullptr;
}

char const* to_string(Arch arch) {
  GpuArch const* const row = gpu_arch_of(arch);
  return row == nullptr ? "cpu" : row->name;
}

Arch arch_of_capability(int major, int minor) {
  if (Capability const* const row = row_of(major, minor, std::nullopt)) {
    return row->arch;
  }
  std::ostringstream message;
  message << "sparse_fmha: compute capability " << major << "." << minor
          << " is not supported. Supported are:" << listed(false);
  throw std::runtime_error(message.str());
}

Arch arch_for_call(int major, int minor) {
  if (std::optional<Arch> const asked = arch_override()) {
    if (row_of(major, minor, asked) == nullptr) {
      std::ostringstream message;
      message << "sparse_fmha: arch_override(\"" << to_string(*asked) << "\"): compute capability "
              << major << "." << minor << " does not run these kernels. These run:" << listed(true);
      throw std::runtime_error(message.str());
    }
    return *asked;
  }
  Arch const arch = arch_of_capability(major, minor);
  Capability const& row = *row_of(major, minor, arch);
  if (std::strcmp(row.status, "compiled") == 0 && !allows_untested()) {
    std::ostringstream message;
    message << "sparse_fmha: the kernels of " << to_string(arch) << " were compiled for compute "
            << "capability " << major << "." << minor << ", but never run on such a GPU; call "
            << "sparse_fmha.allow_untested(), or set SPARSE_FMHA_ALLOW_UNTESTED=1, to use them";
    throw std::runtime_error(message.str());
  }
  return arch;
}

std::optional<Arch> arch_override() {
  int32_t const kept = override_.load(std::memory_order_relaxed);
  return kept == kNoOverride ? std::nullopt : std::optional<Arch>(static_cast<Arch>(kept));
}

std::optional<Arch> set_arch_override(std::optional<Arch> arch) {
  int32_t const before = override_.exchange(arch ? static_cast<int32_t>(*arch) : kNoOverride);
  return before == kNoOverride ? std::nullopt : std::optional<Arch>(static_cast<Arch>(before));
}

void allow_untested(bool allow) { untested_.store(allow, std::memory_order_relaxed); }

std::string buildable_archs() {
  std::string list;
  for (GpuArch const& row : kGpuArchs) {
    list += std::string(list.empty() ? "" : ",") + row.nvcc;
  }
  return list;
}

}  // namespace sparse_fmha
