#include "sparse_fmha/core/cpu_isa.h"

#include <atomic>
#include <stdexcept>

namespace sparse_fmha {
namespace {

constexpr char const* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

CpuIsa best_of_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool const avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) {
    return __builtin_cpu_supports("avx512bf16") ? CpuIsa::kAvx512Bf16 : CpuIsa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return CpuIsa::kAvx2;
  }
#endif
  return CpuIsa::kBaseline;
}

std::atomic<CpuIsa>& current() {
  static std::atomic<CpuIsa> isa{best_of_cpu()};
  return isa;
}

}  // namespace

CpuIsa cpu_isa() { return current().load(std::memory_order_relaxed); }

std::vector<std::string> cpu_isas() {
  return {kNames, kNames + static_cast<int>(best_of_cpu()) + 1};
}

std::string set_cpu_isa(std::string const& name) {
  std::string allowed;
  for (int i = 0; i <= static_cast<int>(best_of_cpu()); ++i) {
    if (name == kNames[i]) {
      return kNames[static_cast<int>(current().exchange(static_cast<CpuIsa>(i)))];
    }
    allowed += (i == 0 ? "" : ", ") + std::string(kNames[i]);
  }
  throw std::invalid_argument("name must be a set that this CPU has (" + allowed + "), got " +
                              name);
}

}  // namespace sparse_fmha
