// The key blocks in the tiles that each group of 64 query rows kept: bits and lists.
#include "sparse_fmha/device/kept_tiles.h"

#include "sparse_fmha/device/allocate.h"
#include "sparse_fmha/device/warp_rows.h"
#include "sparse_fmha/planning/kept_blocks.h"

namespace sparse_fmha::device {
namespace {

struct KeptParams {
  BlockSparse::Params lists;  // of kept blocks
  uint32_t const* skipped;    // [rows, tile_words], tiles
  uint32_t* blocks;           // [rows, words], kept ones
  int64_t rows;               // of groups of 64 queries
  int32_t groups;             // rows of a head
  int32_t tile_words;
  int32_t words;
  int32_t key_blocks;
  int32_t blocks_per_tile;  // the last tile may have fewer
};

// A thread for 32 blocks of a row.
__global__ void __launch_bounds__(kRowThreads) mark_blocks(KeptParams const p) {
  int64_t const index = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (index >= p.rows * p.words) {
    return;
  }
  int64_t const row = index / p.words;
  p.blocks[index] =
      kept_blocks(p.lists, p.skipped + row * p.tile_words, p.blocks_per_tile,
                  static_cast<int32_t>(row % p.groups), static_cast<int32_t>(index % p.words));
}

// A warp for each row: ascending lists of its bits.
__global__ void __launch_bounds__(kRowThreads)
    list_blocks(KeptParams const p, int32_t* counts, int32_t* indices) {
  int64_t const row = row_of_warp();
  if (row >= p.rows) {
    return;
  }
  int32_t const lane = threadIdx.x % kWarp;
  int32_t* const to = indices + row * p.key_blocks;
  int32_t written = 0;
  for (int32_t word = 0; word < p.words; ++word) {
    uint32_t const bits = p.blocks[row * p.words + word];
    if ((bits >> lane & 1) != 0) {
      to[written + __popc(bits & ((1u << lane) - 1))] = 32 * word + lane;
    }
    written += __popc(bits);
  }
  if (lane == 0) {
    counts[row] = written;
  }
}

// All but lists, tiles and blocks.
KeptParams params_of(FmhaProblem const& problem) {
  KeptParams params = {};
  params.groups = skip_groups(problem);
  params.rows = int64_t{problem.batch} * problem.heads_q * params.groups;
  params.tile_words = skip_words(problem);
  params.key_blocks = ceil_div(problem.grid_kv[kGridAxes - 1], kKeptBlock);
  params.words = ceil_div(params.key_blocks, 32);
  return params;
}

}  // namespace

void show_kept_blocks(FmhaProblem& problem, int32_t tile_k, ExecutionContext const& context) {
  KeptParams params = params_of(problem);
  BlockSparse::Params& lists = params.lists;
  lists.len_q = problem.grid_q[kGridAxes - 1];
  lists.len_kv = problem.grid_kv[kGridAxes - 1];
  lists.block_q = 64;
  lists.block_kv = kKeptBlock;
  lists.causal = std::holds_alternative<Causal::Params>(problem.sparsity);
  lists.head_stride = params.groups;
  lists.batch_stride = lists.head_stride * problem.heads_q;
  params.skipped = problem.skip_bits;
  params.blocks_per_tile = tile_k / kKeptBlock;
  params.blocks = allocate<uint32_t>(context, params.rows * params.words);
  int64_t const threads = params.rows * params.words;
  mark_blocks<<<grid_size((threads + kRowThreads - 1) / kRowThreads, "the blocks of kept tiles"),
                kRowThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(params);
  check_cuda(cudaGetLastError(), "launching the marking of kept tiles");
  problem.sparsity = lists;
  problem.kept_blocks = params.blocks;
  problem.skip_threshold = nullptr;
}

void list_kept_blocks(FmhaProblem& problem, ExecutionContext const& context) {
  KeptParams params = params_of(problem);
  params.blocks = const_cast<uint32_t*>(problem.kept_blocks);
  auto* const counts = allocate<int32_t>(context, params.rows);
  auto* const indices = allocate<int32_t>(context, params.rows * params.key_blocks);
  list_blocks<<<row_blocks(params.rows, "the groups of 64 query rows"), kRowThreads, 0,
                static_cast<cudaStream_t>(context.stream)>>>(params, counts, indices);
  check_cuda(cudaGetLastError(), "launching the listing of kept tiles");
  std::get<BlockSparse::Params>(problem.sparsity).full = {counts, indices, params.key_blocks};
}

}  // namespace sparse_fmha::device
