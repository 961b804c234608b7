// Dispatch to the code of the best instruction set, and to all threads.
#pragma once

#include <atomic>
#include <memory>
#include <new>

#include "sparse_fmha/core/cpu_isa.h"
#include "sparse_fmha/core/registry.h"

// `call`, an expression that begins with a function of the instruction set's namespace, for the
// set that calls take (core/cpu_isa.h); the second one, for a dtype that may have one more.
#if defined(__x86_64__)
#define SPARSE_FMHA_BEST_ISA(call)                  \
  (cpu_isa() >= CpuIsa::kAvx512 ? cpu::avx512::call \
   : cpu_isa() >= CpuIsa::kAvx2 ? cpu::avx2::call   \
                                : cpu::baseline::call)
#if defined(SPARSE_FMHA_HAS_AMX)
#define SPARSE_FMHA_BEST_ISA_OF_BF16(call) \
  (takes_tiles() ? cpu::avx512_amx::call : cpu::avx512_bf16::call)
#else
#define SPARSE_FMHA_BEST_ISA_OF_BF16(call) cpu::avx512_bf16::call
#endif
#define SPARSE_FMHA_BEST_ISA_OF(dtype, call)                          \
  ((dtype) == DataType::kBFloat16 && cpu_isa() >= CpuIsa::kAvx512Bf16 \
       ? SPARSE_FMHA_BEST_ISA_OF_BF16(call)                           \
       : SPARSE_FMHA_BEST_ISA(call))
#else
#define SPARSE_FMHA_BEST_ISA(call) cpu::baseline::call
#define SPARSE_FMHA_BEST_ISA_OF(dtype, call) cpu::baseline::call
#endif

namespace sparse_fmha::cpu {

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

// Calls body(item, scratch) for items 0 to n - 1 on the caller's threads. Each thread has its own
// scratch of `scratch_bytes`, aligned to 64.
template <class Body>
void share(ExecutionContext const& context, int64_t n, size_t scratch_bytes, Body const& body) {
  struct Job {
    int64_t n;
    size_t scratch_bytes;
    Body const& body;
    std::atomic<int64_t> next{0};

    void work() {
      std::unique_ptr<void, AlignedDelete> const scratch(
          ::operator new(scratch_bytes, std::align_val_t{64}));
      for (int64_t item = next++; item < n; item = next++) {
        body(item, scratch.get());
      }
    }
  };
  int const threads = context.parallel == nullptr ? 1 : context.parallel->num_threads();
  Job job{n, scratch_bytes, body};
  if (threads == 1) {
    job.work();
    return;
  }
  context.parallel->run(
      threads, [](void* job, int64_t, int64_t) { static_cast<Job*>(job)->work(); }, &job);
}

}  // namespace sparse_fmha::cpu
