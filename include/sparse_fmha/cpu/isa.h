// The functions that are compiled once per instruction set, for kernel_rows.cpp, backward_rows.cpp
// and anchor.cpp.
#pragma once

#include <cstddef>

#include "sparse_fmha/core/anchor.h"
#include "sparse_fmha/cpu/backward/plan.h"

namespace sparse_fmha::cpu {

struct IsaKernel {
  // Scratch memory per thread in bytes, aligned to 64.
  size_t (*scratch_bytes)(FmhaProblem const&, TileShape const&);
  // One query tile of one head: item = (batch * heads_q + head) * query tiles + tile.
  void (*attend)(FmhaProblem const&, void const* params, TileShape const&, int64_t item,
                 void* scratch);
};

struct AnchorIsa {
  // Scratch memory per thread in bytes, aligned to 64.
  size_t (*means_scratch)(AnchorMeans const&);
  size_t (*keys_scratch)(AnchorKeys const&);
  // One block of queries: item = (batch * heads_q + head) * blocks + block.
  void (*means)(AnchorMeans const&, int64_t item, void* scratch);
  // One superblock: item = (batch * heads_q + head) * superblocks + superblock.
  void (*keys)(AnchorKeys const&, int64_t item, void* scratch);
};

// `mechanism` is the index in Sparsity; `params` above are that mechanism's Params. With `skips` a
// query tile is a group of 64 rows (groups.h).
namespace baseline {
IsaKernel kernel(DataType dtype, size_t mechanism, bool skips);
BackwardStages backward(DataType dtype, size_t mechanism, bool skips);
AnchorIsa anchor(DataType dtype);
}  // namespace baseline
namespace avx2 {
IsaKernel kernel(DataType dtype, size_t mechanism, bool skips);
BackwardStages backward(DataType dtype, size_t mechanism, bool skips);
AnchorIsa anchor(DataType dtype);
}  // namespace avx2
namespace avx512 {
IsaKernel kernel(DataType dtype, size_t mechanism, bool skips);
BackwardStages backward(DataType dtype, size_t mechanism, bool skips);
AnchorIsa anchor(DataType dtype);
}  // namespace avx512
namespace avx512_bf16 {  // of bf16 alone
IsaKernel kernel(DataType dtype, size_t mechanism, bool skips);
BackwardStages backward(DataType dtype, size_t mechanism, bool skips);
}  // namespace avx512_bf16
namespace avx512_amx {  // likewise
IsaKernel kernel(DataType dtype, size_t mechanism, bool skips);
BackwardStages backward(DataType dtype, size_t mechanism, bool skips);
}  // namespace avx512_amx

}  // namespace sparse_fmha::cpu
