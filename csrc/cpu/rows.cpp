#include "sparse_fmha/cpu/rows.h"

#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>

#include "sparse_fmha/cpu/isa.h"
#include "sparse_fmha/cpu/tiles.h"

namespace sparse_fmha {
namespace {

constexpr int kMaxHeadDim = 256;

cpu::IsaKernel isa_kernel(DataType dtype, size_t mechanism, bool skips) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return cpu::avx512::kernel(dtype, mechanism, skips);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return cpu::avx2::kernel(dtype, mechanism, skips);
  }
#endif
  return cpu::baseline::kernel(dtype, mechanism, skips);
}

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

// What the threads of one call share.
struct Job {
  FmhaProblem const& problem;
  void const* params;
  TileShape shape;
  cpu::IsaKernel kernel;
  int64_t items;
  std::atomic<int64_t> next{0};

  void work() {
    std::unique_ptr<void, AlignedDelete> const scratch(
        ::operator new(kernel.scratch_bytes(problem, shape), std::align_val_t{64}));
    for (int64_t item = next++; item < items; item = next++) {
      kernel.attend(problem, params, shape, item, scratch.get());
    }
  }
};

void launch(FmhaProblem const& problem, ExecutionContext const& context) {
  int const threads = context.parallel == nullptr ? 1 : context.parallel->num_threads();
  cpu::Tiling const tiling = cpu::choose_tiles(problem, threads);
  int64_t const heads = static_cast<int64_t>(problem.batch) * problem.heads_q;
  Job job{problem, std::visit([](auto const& p) -> void const* { return &p; }, problem.sparsity),
          tiling.shape,
          isa_kernel(problem.dtype, problem.sparsity.index(), problem.skip_threshold != nullptr),
          heads * tiling.query_tiles};
  if (threads == 1) {
    job.work();
    return;
  }
  context.parallel->run(
      threads, [](void* job, int64_t, int64_t) { static_cast<Job*>(job)->work(); }, &job);
}

}  // namespace

std::vector<KernelRow> cpu_kernel_rows() {
  std::vector<KernelRow> rows;
  char const* const mechanisms[] = {Dense::kName, Causal::kName, Neighborhood::kName,
                                    BlockSparse::kName, Stripe::kName};
  for (size_t m = 0; m < std::size(mechanisms); ++m) {
    for (DataType dtype :
         {DataType::kFloat16, DataType::kBFloat16, DataType::kFloat32, DataType::kFloat64}) {
      for (bool skips : {false, true}) {
        KernelRow row;
        row.info.key = {Arch::kCpu, dtype, kMaxHeadDim, static_cast<int32_t>(m), skips};
        row.info.mechanism = mechanisms[m];
        row.info.name = "cpu_" + row.info.mechanism + "_" + to_string(dtype);
        row.info.name += skips ? "_skip" : "";
        row.launch = launch;
        rows.push_back(row);
      }
    }
  }
  return rows;
}

}  // namespace sparse_fmha
