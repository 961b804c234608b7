// The GPU kernels of Quest's choice: bounds in fp16, bf16 and fp32, head dims up to 256.
#pragma once

#include "sparse_fmha/core/quest_pages.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::device {

// Throws std::runtime_error in a build without GPU kernels.
void choose_quest_pages(QuestPages const& pages, ExecutionContext const& context);

}  // namespace sparse_fmha::device
