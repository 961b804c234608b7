// The CPU's entries in the registry.
#pragma once

#include <vector>

#include "sparse_fmha/core/anchor.h"
#include "sparse_fmha/core/hip_search.h"
#include "sparse_fmha/core/merge.h"
#include "sparse_fmha/core/quest_pages.h"
#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/core/ssa_choices.h"

namespace sparse_fmha {

// Rows of the kernel table: every mechanism and dtype, any head dim.
std::vector<KernelRow> cpu_kernel_rows();
// The same for the backward passes.
std::vector<KernelRow> cpu_backward_rows();
// Fills `gradients->row_terms`, which the backward rows read.
void cpu_fill_row_terms(FmhaProblem const& problem, ExecutionContext const& context);
// Memory for `gradients->skipped_tiles` of a problem whose tiles are skipped, in which
// cpu_fill_row_terms notes the tiles that the forward pass skipped.
void* cpu_skipped_tiles(FmhaProblem const& problem, ExecutionContext const& context);
// Decode attention: every form of keys and dtype, any head dim.
std::vector<KernelRow> cpu_decode_rows();

// Every dtype, any head dim.
AnchorKernels cpu_anchor_kernels();
void cpu_merge_parts(MergeProblem const& problem, ExecutionContext const& context);
void cpu_find_hip_keys(HipSearch const& search, ExecutionContext const& context);
void cpu_choose_quest_pages(QuestPages const& pages, ExecutionContext const& context);
void cpu_choose_ssa_blocks(SsaChoices const& choices, ExecutionContext const& context);

}  // namespace sparse_fmha
