#include "sparse_fmha/core/registry.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "sparse_fmha/core/errors.h"
#include "sparse_fmha/cpu/kernel_rows.h"
#include "sparse_fmha/device/anchor_kernels.h"
#include "sparse_fmha/device/hip_search.h"
#include "sparse_fmha/device/merge_parts.h"
#include "sparse_fmha/device/quest_pages.h"
#include "sparse_fmha/device/row_terms.h"
#include "sparse_fmha/device/ssa_choices.h"

namespace sparse_fmha {

// kernel_rows.inc names the compiled rows of csrc/kernels/*.def, one function each.
#define SPARSE_FMHA_ROW(name) KernelRow name();
#include "kernel_rows.inc"
#undef SPARSE_FMHA_ROW

namespace {

std::vector<KernelRow> make_table() {
  std::vector<KernelRow> rows;
#define SPARSE_FMHA_ROW(name) rows.push_back(name());
#include "kernel_rows.inc"
#undef SPARSE_FMHA_ROW
  for (auto const& of_cpu : {cpu_kernel_rows(), cpu_backward_rows(), cpu_decode_rows()}) {
    rows.insert(rows.end(), of_cpu.begin(), of_cpu.end());
  }
  return rows;
}

bool serves(KernelKey const& row, KernelKey const& request) {
  // A forward kernel of a GPU with biases costs more without.
  bool const optional = row.arch == Arch::kCpu || row.pass != Pass::kForward;
  bool const bias = row.key_bias == request.key_bias || (row.key_bias && optional);
  // Those of the CPU take one sequence after the other.
  bool const packed = row.packed == request.packed || row.arch == Arch::kCpu;
  // The kernels of the family sm80 have one width for both.
  bool const widths =
      request.value_dim == request.head_dim || row.arch == Arch::kCpu || row.arch == Arch::kSm90;
  return row.arch == request.arch && row.pass == request.pass && row.dtype == request.dtype &&
         row.mechanism == request.mechanism && row.skips == request.skips && bias && packed &&
         row.dilated == request.dilated && row.head_dim >= request.head_dim &&
         row.value_dim >= request.value_dim && widths;
}

}  // namespace

std::vector<KernelRow> const& kernel_table() {
  static std::vector<KernelRow> const table = make_table();
  return table;
}

bool is_built(Arch arch) {
  auto const& table = kernel_table();
  return std::any_of(table.begin(), table.end(),
                     [&](KernelRow const& row) { return row.info.key.arch == arch; });
}

KernelRow const* look_for_kernel(KernelKey const& request, int32_t tile_q) {
  KernelRow const* best = nullptr;
  auto better = [&](KernelInfo const& a, KernelInfo const& b) {
    return a.key.head_dim != b.key.head_dim     ? a.key.head_dim < b.key.head_dim
           : a.key.value_dim != b.key.value_dim ? a.key.value_dim < b.key.value_dim
                                                : a.tile_q == tile_q && b.tile_q != tile_q;
  };
  for (KernelRow const& row : kernel_table()) {
    if (serves(row.info.key, request) && (best == nullptr || better(row.info, best->info))) {
      best = &row;
    }
  }
  return best;
}

KernelRow const& find_kernel(KernelKey const& request, int32_t tile_q) {
  if (KernelRow const* const row = look_for_kernel(request, tile_q)) {
    return *row;
  }
  KernelKey on_cpu = request;
  on_cpu.arch = Arch::kCpu;
  auto const& table = kernel_table();
  bool const only_on_cpu = std::any_of(table.begin(), table.end(), [&](KernelRow const& row) {
    return serves(row.info.key, on_cpu);
  });
  std::ostringstream message;
  message << "sparse_fmha: no kernel for " << to_string(request)
          << (only_on_cpu ? ", which runs on the CPU only; move the tensors to the CPU" : "")
          << ". Compiled kernels:";
  for (KernelRow const& row : kernel_table()) {
    KernelKey const& key = row.info.key;
    message << "\n  " << row.info.name << " (head_dim <= " << key.head_dim;
    if (key.value_dim != key.head_dim) {
      message << ", value_dim <= " << key.value_dim;
    }
    message << ")";
  }
  throw only_on_cpu ? not_implemented(message.str()) : std::runtime_error(message.str());
}

void fill_row_terms(Arch arch, FmhaProblem const& problem, ExecutionContext const& context) {
  (arch == Arch::kCpu ? cpu_fill_row_terms : device::fill_row_terms)(problem, context);
}

AnchorKernels anchor_kernels(Arch arch) {
  return arch == Arch::kCpu ? cpu_anchor_kernels() : device::anchor_kernels();
}

void merge_parts(Arch arch, MergeProblem const& problem, ExecutionContext const& context) {
  (arch == Arch::kCpu ? cpu_merge_parts : device::merge_parts)(problem, context);
}

void find_hip_keys(Arch arch, HipSearch const& search, ExecutionContext const& context) {
  (arch == Arch::kCpu ? cpu_find_hip_keys : device::find_hip_keys)(search, context);
}

void choose_quest_pages(Arch arch, QuestPages const& pages, ExecutionContext const& context) {
  (arch == Arch::kCpu ? cpu_choose_quest_pages : device::choose_quest_pages)(pages, context);
}

void choose_ssa_blocks(Arch arch, SsaChoices const& choices, ExecutionContext const& context) {
  (arch == Arch::kCpu ? cpu_choose_ssa_blocks : device::choose_ssa_blocks)(choices, context);
}

std::string to_string(KernelKey const& key) {
  std::ostringstream text;
  text << "arch=" << to_string(key.arch) << ", pass=" << to_string(key.pass)
       << ", mechanism=" << Mechanisms::kNames[key.mechanism] << ", dtype=" << to_string(key.dtype)
       << ", head_dim=" << key.head_dim;
  if (key.value_dim != key.head_dim) {
    text << ", value_dim=" << key.value_dim;
  }
  text << (key.skips ? ", with skipping" : "") << (key.key_bias ? ", with key_bias" : "")
       << (key.packed ? ", packed" : "") << (key.dilated ? ", dilated" : "");
  return text.str();
}

char const* to_string(Pass pass) {
  switch (pass) {
    case Pass::kForward:
      return "forward";
    case Pass::kBackwardDq:
      return "backward_dq";
    case Pass::kBackwardDkv:
      return "backward_dkv";
    case Pass::kBackwardFused:
      return "backward_fused";
    case Pass::kDecode:
      return "decode";
  }
  return "unknown";
}

char const* to_string(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat16:
      return "float16";
    case DataType::kBFloat16:
      return "bfloat16";
    case DataType::kFloat32:
      return "float32";
    case DataType::kFloat64:
      return "float64";
  }
  return "unknown";
}

}  // namespace sparse_fmha
