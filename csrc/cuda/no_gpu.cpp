// Replaces the other sources of this folder and of device/ in a build without GPU kernels.
#include <stdexcept>

#include "sparse_fmha/cuda/current_device.h"
#include "sparse_fmha/cuda/device_arch.h"
#include "sparse_fmha/device/anchor_kernels.h"
#include "sparse_fmha/device/gathered_keys.h"
#include "sparse_fmha/device/hip_search.h"
#include "sparse_fmha/device/kept_tiles.h"
#include "sparse_fmha/device/kept_windows.h"
#include "sparse_fmha/device/merge_parts.h"
#include "sparse_fmha/device/quest_pages.h"
#include "sparse_fmha/device/row_terms.h"
#include "sparse_fmha/device/ssa_choices.h"

namespace sparse_fmha {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error("sparse_fmha: this build has no GPU kernels");
}

}  // namespace

void make_current(int32_t /*device*/) { refuse(); }

Arch device_arch(int32_t /*device*/) { refuse(); }

int32_t device_multiprocessors(int32_t /*device*/) { refuse(); }

int driver_version() { return 0; }

AnchorKernels device::anchor_kernels() { refuse(); }

void device::merge_parts(MergeProblem const& /*problem*/, ExecutionContext const& /*context*/) {
  refuse();
}

void device::find_hip_keys(HipSearch const& /*search*/, ExecutionContext const& /*context*/) {
  refuse();
}

void device::choose_quest_pages(QuestPages const& /*pages*/, ExecutionContext const& /*context*/) {
  refuse();
}

void device::choose_ssa_blocks(SsaChoices const& /*choices*/, ExecutionContext const& /*context*/) {
  refuse();
}

void device::fill_row_terms(FmhaProblem const& /*problem*/, ExecutionContext const& /*context*/) {
  refuse();
}

void device::show_kept_blocks(FmhaProblem& /*problem*/, int32_t /*tile_k*/,
                              ExecutionContext const& /*context*/) {
  refuse();
}

void device::show_kept_lists(FmhaProblem& /*problem*/, int32_t /*tile_k*/,
                             ExecutionContext const& /*context*/) {
  refuse();
}

device::KeptWindows device::copy_kept_windows(FmhaProblem const& /*problem*/,
                                              KernelInfo const& /*forward*/,
                                              ExecutionContext const& /*context*/) {
  refuse();
}

void device::return_gradients(FmhaProblem const& /*problem*/, KeptWindows const& /*windows*/,
                              ExecutionContext const& /*context*/) {
  refuse();
}

device::ListedKeys device::list_keys(FmhaProblem const& /*problem*/,
                                     ExecutionContext const& /*context*/) {
  refuse();
}

device::GatheredKeys device::gather_keys(FmhaProblem const& /*problem*/, ListedKeys const& /*keys*/,
                                         GatheredPart const& /*part*/,
                                         ExecutionContext const& /*context*/) {
  refuse();
}

void device::return_queries(FmhaProblem const& /*problem*/, GatheredPart const& /*part*/,
                            GatheredKeys const& /*gathered*/, ExecutionContext const& /*context*/) {
  refuse();
}

void device::add_gathered(FmhaProblem const& /*problem*/, ListedKeys const& /*keys*/,
                          GatheredPart const& /*part*/, GatheredKeys const& /*gathered*/,
                          ExecutionContext const& /*context*/) {
  refuse();
}

void device::list_kept_blocks(FmhaProblem& /*problem*/, ExecutionContext const& /*context*/) {
  refuse();
}

}  // namespace sparse_fmha
