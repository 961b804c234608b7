// Lists of the key blocks in the tiles that each group of 64 query rows kept.
#include "sparse_fmha/device/kept_tiles.h"

#include "sparse_fmha/device/mma_launch.h"

namespace sparse_fmha::device {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr uint32_t kAll = 0xffffffff;

struct KeptParams {
  uint8_t const* kept;  // [rows, tiles]
  int32_t* counts;      // [rows]
  int32_t* indices;     // [rows, blocks], ascending
  int64_t rows;
  int32_t tiles;
  int32_t blocks;           // key blocks of a row at most
  int32_t blocks_per_tile;  // the last tile may have fewer
};

// A warp for each row.
__global__ void __launch_bounds__(kWarps* kWarp) list_blocks(KeptParams const p) {
  int64_t const row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= p.rows) {
    return;
  }
  int32_t const lane = threadIdx.x % kWarp;
  uint8_t const* const kept = p.kept + row * p.tiles;
  int32_t* const to = p.indices + row * p.blocks;
  int32_t written = 0;
  for (int32_t first = 0; first < p.tiles; first += kWarp) {
    int32_t const tile = first + lane;
    bool const mine = tile < p.tiles && kept[tile] != 0;
    uint32_t const all = __ballot_sync(kAll, mine);
    int32_t const before = written + __popc(all & ((1u << lane) - 1)) * p.blocks_per_tile;
    int32_t const begin = tile * p.blocks_per_tile;
    int32_t const size = min(p.blocks_per_tile, p.blocks - begin);
    for (int32_t i = 0; mine && i < size; ++i) {
      to[before + i] = begin + i;
    }
    written += __popc(all) * p.blocks_per_tile;
  }
  if (lane == 0) {
    // The last tile was counted as a whole one.
    int32_t const missing = p.tiles * p.blocks_per_tile - p.blocks;
    p.counts[row] = written - (kept[p.tiles - 1] != 0 ? missing : 0);
  }
}

}  // namespace

BlockSparse::Params list_kept_tiles(FmhaProblem const& problem, int32_t tile_k,
                                    ExecutionContext const& context) {
  int32_t const len_q = problem.grid_q[kGridAxes - 1];
  int32_t const len_kv = problem.grid_kv[kGridAxes - 1];
  int32_t const groups = ceil_div(len_q, 64);
  KeptParams params;
  params.kept = problem.kept_tiles;
  params.rows = int64_t{problem.batch} * problem.heads_q * groups;
  params.tiles = ceil_div(len_kv, tile_k);
  params.blocks = ceil_div(len_kv, kKeptBlock);
  params.blocks_per_tile = tile_k / kKeptBlock;
  auto allocate = [&](int64_t numbers) {
    size_t const bytes = static_cast<size_t>(numbers) * sizeof(int32_t);
    return static_cast<int32_t*>(context.memory->allocate(bytes));
  };
  params.counts = allocate(params.rows);
  params.indices = allocate(params.rows * params.blocks);
  list_blocks<<<grid_size((params.rows + kWarps - 1) / kWarps, "the groups of 64 query rows"),
                kWarps * kWarp, 0, static_cast<cudaStream_t>(context.stream)>>>(params);
  check_cuda(cudaGetLastError(), "launching the listing of kept tiles");
  BlockSparse::Params lists = {};
  lists.len_q = len_q;
  lists.len_kv = len_kv;
  lists.block_q = 64;
  lists.block_kv = kKeptBlock;
  lists.causal = std::holds_alternative<Causal::Params>(problem.sparsity);
  lists.full = {params.counts, params.indices, params.blocks};
  lists.batch_stride = int64_t{problem.heads_q} * groups;
  lists.head_stride = groups;
  return lists;
}

}  // namespace sparse_fmha::device
