#include "sparse_fmha/cpu/kernel_rows.h"

#include "sparse_fmha/cpu/dispatch.h"
#include "sparse_fmha/cpu/isa.h"
#include "sparse_fmha/cpu/tiles.h"

namespace sparse_fmha {
namespace {

constexpr int kMaxHeadDim = 256;

void launch(FmhaProblem const& problem, ExecutionContext const& context) {
  int const threads = context.parallel == nullptr ? 1 : context.parallel->num_threads();
  cpu::Tiling const tiling = cpu::choose_tiles(problem, threads);
  int64_t const heads = static_cast<int64_t>(problem.batch) * problem.heads_q;
  void const* const params =
      std::visit([](auto const& p) -> void const* { return &p; }, problem.sparsity);
  bool const skips = problem.skip_threshold != nullptr;
  cpu::IsaKernel const kernel = SPARSE_FMHA_BEST_ISA_OF(
      problem.dtype, kernel(problem.dtype, problem.sparsity.index(), skips));
  cpu::share(context, heads * tiling.query_tiles, kernel.scratch_bytes(problem, tiling.shape),
             [&](int64_t item, void* scratch) {
               kernel.attend(problem, params, tiling.shape, item, scratch);
             });
}

}  // namespace

std::vector<KernelRow> cpu_kernel_rows() {
  std::vector<KernelRow> rows;
  for (size_t m = 0; m < std::size(Mechanisms::kNames); ++m) {
    for (DataType dtype :
         {DataType::kFloat16, DataType::kBFloat16, DataType::kFloat32, DataType::kFloat64}) {
      for (bool skips : {false, true}) {
        KernelRow row;
        row.info.key = {Arch::kCpu,  Pass::kForward,          dtype, kMaxHeadDim,
                        kMaxHeadDim, static_cast<int32_t>(m), skips, true};
        row.info.mechanism = Mechanisms::kNames[m];
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
