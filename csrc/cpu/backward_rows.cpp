#include <algorithm>

#include "sparse_fmha/cpu/backward/choose_plan.h"
#include "sparse_fmha/cpu/dispatch.h"
#include "sparse_fmha/cpu/isa.h"
#include "sparse_fmha/cpu/kernel_rows.h"

namespace sparse_fmha {
namespace {

constexpr int kMaxHeadDim = 256;

enum class Stage { kRowTerms, kQueries, kKeys };

void launch(FmhaProblem const& problem, ExecutionContext const& context, Stage which) {
  void const* const params =
      std::visit([](auto const& p) -> void const* { return &p; }, problem.sparsity);
  bool const skips = problem.skip_threshold != nullptr;
  cpu::BackwardStages const stages = SPARSE_FMHA_BEST_ISA_OF(
      problem.dtype, backward(problem.dtype, problem.sparsity.index(), skips));
  cpu::BackwardPlan plan = cpu::plan_backward(problem);

  int64_t const heads = static_cast<int64_t>(problem.batch) * problem.heads_q;
  // row_terms has 16 bytes for each query: enough for two numbers of any compute type.
  size_t const element = problem.dtype == DataType::kFloat64 ? sizeof(double) : sizeof(float);
  plan.lse = problem.gradients->row_terms;
  plan.delta = static_cast<char*>(plan.lse) + element * heads * volume(problem.grid_q);
  if (skips) {
    auto* const memory = static_cast<char*>(problem.gradients->skipped_tiles);
    plan.skipped.offsets = reinterpret_cast<int64_t const*>(memory);
    plan.skipped.bytes =
        reinterpret_cast<uint8_t*>(memory + sizeof(int64_t) * heads * plan.query_tiles);
  }
  auto run = [&](cpu::BackwardStage const& stage, int64_t items) {
    cpu::share(
        context, items, stage.scratch_bytes(problem, plan),
        [&](int64_t item, void* scratch) { stage.run(problem, params, plan, item, scratch); });
  };
  switch (which) {
    case Stage::kRowTerms:
      run(stages.row_terms, heads * plan.query_tiles);
      return;
    case Stage::kQueries:
      run(stages.queries, heads * plan.query_tiles);
      return;
    case Stage::kKeys:
      break;
  }
  cpu::TransposedMemory memory;
  if (auto const* const blocks = std::get_if<BlockSparse::Params>(&problem.sparsity)) {
    plan.lists = cpu::transpose(*blocks, problem.batch, problem.heads_q, memory);
  }
  int64_t const heads_kv = static_cast<int64_t>(problem.batch) * problem.heads_kv;
  run(stages.keys, heads_kv * (plan.extra_tiles + plan.key_tiles));
}

}  // namespace

void cpu_fill_row_terms(FmhaProblem const& problem, ExecutionContext const& context) {
  launch(problem, context, Stage::kRowTerms);
}

void* cpu_skipped_tiles(FmhaProblem const& problem, ExecutionContext const& context) {
  std::vector<int64_t> const offsets = cpu::visit_offsets(problem);
  size_t const groups = offsets.size() - 1;
  void* const memory = context.memory->allocate(groups * sizeof(int64_t) + offsets.back());
  std::copy_n(offsets.begin(), groups, static_cast<int64_t*>(memory));
  return memory;
}

std::vector<KernelRow> cpu_backward_rows() {
  std::vector<KernelRow> rows;
  for (size_t m = 0; m < std::size(Mechanisms::kNames); ++m) {
    for (DataType dtype :
         {DataType::kFloat16, DataType::kBFloat16, DataType::kFloat32, DataType::kFloat64}) {
      for (Pass pass : {Pass::kBackwardDq, Pass::kBackwardDkv}) {
        for (bool skips : {false, true}) {
          KernelRow row;
          row.info.key = {Arch::kCpu,  pass,        dtype,
                          kMaxHeadDim, kMaxHeadDim, static_cast<int32_t>(m),
                          skips,       true};
          row.info.mechanism = Mechanisms::kNames[m];
          row.info.name = std::string("cpu_") + to_string(pass) + "_" + row.info.mechanism + "_" +
                          to_string(dtype) + (skips ? "_skip" : "");
          row.launch = [](FmhaProblem const& problem, ExecutionContext const& context) {
            launch(problem, context, Stage::kQueries);
          };
          if (pass == Pass::kBackwardDkv) {
            row.launch = [](FmhaProblem const& problem, ExecutionContext const& context) {
              launch(problem, context, Stage::kKeys);
            };
          }
          rows.push_back(row);
        }
      }
    }
  }
  return rows;
}

}  // namespace sparse_fmha
