#include "sparse_fmha/core/cpu_isa.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparse_fmha {
namespace {

constexpr char const* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "avx512_amx"};

#if defined(SPARSE_FMHA_EMULATED_TILES)
bool may_have_tiles() { return true; }
bool ask_for_tiles() { return true; }
#elif defined(SPARSE_FMHA_HAS_AMX) && defined(__x86_64__) && defined(__linux__)
// Whether the processor has the instructions, and the operating system keeps the registers.
bool may_have_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & bit_OSXSAVE) == 0 ||
      !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    return false;
  }
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr unsigned kTileConfig = 1u << 17, kTileData = 1u << 18;  // state components
  bool const has = (d & kAmxBf16) != 0 && (d & kAmxTile) != 0;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return has && (low & kTileConfig) != 0 && (low & kTileData) != 0;
}
bool ask_for_tiles() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM, since Linux 5.16
  constexpr long kTileData = 18;
  static bool const granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#else
[[maybe_unused]] bool may_have_tiles() { return false; }
bool ask_for_tiles() { return false; }
#endif

// Of this CPU, whatever the kernel permits.
CpuIsa find_best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool const avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    return may_have_tiles() ? CpuIsa::kAvx512Amx : CpuIsa::kAvx512Bf16;
  }
  if (avx512) {
    return CpuIsa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return CpuIsa::kAvx2;
  }
#endif
  return CpuIsa::kBaseline;
}

CpuIsa best_of_cpu() {
  static CpuIsa const best = find_best();
  return best;
}
CpuIsa best_permitted() {
  CpuIsa const best = best_of_cpu();
  return best == CpuIsa::kAvx512Amx && !ask_for_tiles() ? CpuIsa::kAvx512Bf16 : best;
}

std::atomic<CpuIsa>& current() {
  static std::atomic<CpuIsa> isa{best_of_cpu()};
  return isa;
}

}  // namespace

CpuIsa cpu_isa() { return current().load(std::memory_order_relaxed); }

bool takes_tiles() { return cpu_isa() >= CpuIsa::kAvx512Amx && ask_for_tiles(); }

std::vector<std::string> cpu_isas() {
  return {kNames, kNames + static_cast<int>(best_permitted()) + 1};
}

std::string set_cpu_isa(std::string const& name) {
  std::string allowed;
  for (int i = 0; i <= static_cast<int>(best_permitted()); ++i) {
    if (name == kNames[i]) {
      CpuIsa const before = current().exchange(static_cast<CpuIsa>(i));
      return kNames[static_cast<int>(std::min(before, best_permitted()))];
    }
    allowed += (i == 0 ? "" : ", ") + std::string(kNames[i]);
  }
  throw std::invalid_argument("name must be a set that this CPU has (" + allowed + "), got " +
                              name);
}

}  // namespace sparse_fmha
