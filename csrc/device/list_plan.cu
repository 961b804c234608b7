#include "sparse_fmha/device/list_plan.h"

#include <algorithm>
#include <string>

#include "sparse_fmha/cuda/check.h"
#include "sparse_fmha/device/order_by_weight.h"

namespace sparse_fmha::device {
namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAll = 0xffffffff;
constexpr int kMaxBitmapBytes = 48 * 1024;

// One warp per query tile, using two bitmaps of the key blocks in shared memory.
__global__ void merge_pairs(BlockSparse::Params params, ListSizes sizes, int32_t words,
                            int32_t* merged, int32_t* merged_counts) {
  extern __shared__ uint32_t bitmaps[];  // [2, words]
  int32_t const lane = threadIdx.x;
  int64_t const tile = blockIdx.x;
  int64_t const list = tile / sizes.q_tiles;
  int32_t const first_block = 2 * static_cast<int32_t>(tile % sizes.q_tiles);
  int32_t const key_blocks = ceil_div(params.len_kv, params.block_kv);
  for (int32_t i = lane; i < 2 * words; i += kWarp) {
    bitmaps[i] = 0;
  }
  __syncwarp();
  for (int32_t w = 0; w < 2 && first_block + w < sizes.blocks; ++w) {
    int64_t const row = list * sizes.blocks + first_block + w;
    int32_t const count = BlockSparse::count(params.full, row);
    int32_t const* const indices = params.full.indices + row * params.full.width;
    for (int32_t i = lane; i < count; i += kWarp) {
      int32_t const block = indices[i];
      if (block >= 0 && block < key_blocks) {
        atomicOr(&bitmaps[w * words + block / 32], 1u << block % 32);
      }
    }
  }
  __syncwarp();

  // For one word: the blocks of both, of the first alone, of the second alone.
  auto part = [&](int32_t word, int32_t i) {
    uint32_t const a = word < words ? bitmaps[word] : 0;
    uint32_t const b = word < words ? bitmaps[words + word] : 0;
    return i == 0 ? a & b : i == 1 ? a & ~b : b & ~a;
  };
  int32_t* to = merged + tile * 2 * params.full.width;
  for (int32_t i = 0; i < 3; ++i) {
    int32_t written = 0;
    for (int32_t first = 0; first < words; first += kWarp) {
      uint32_t bits = part(first + lane, i);
      int32_t const mine = __popc(bits);
      int32_t end = mine;
      for (int32_t step = 1; step < kWarp; step *= 2) {
        int32_t const before = __shfl_up_sync(kAll, end, step);
        end += lane >= step ? before : 0;
      }
      for (int32_t at = written + end - mine; bits != 0; ++at) {
        to[at] = (first + lane) * 32 + __ffs(bits) - 1;
        bits &= bits - 1;
      }
      written += __shfl_sync(kAll, end, kWarp - 1);
    }
    to += written;
    if (lane == 0) {
      merged_counts[tile * 3 + i] = written;
    }
  }
}

__global__ void __launch_bounds__(kOrderThreads)
    order_tiles(BlockSparse::Params params, ListSizes sizes, int32_t const* merged_counts,
                int32_t* order) {
  int64_t const list = blockIdx.x / order_groups(sizes.q_tiles);
  auto partials = [&](int64_t row) { return BlockSparse::count(params.partial, row); };
  auto weight = [&](int32_t tile) {
    if (params.block_q == 128) {
      int64_t const row = list * sizes.blocks + tile;
      return BlockSparse::count(params.full, row) + partials(row);
    }
    int32_t const* const counts = merged_counts + 3 * (list * sizes.q_tiles + tile);
    int64_t const row = list * sizes.blocks + 2 * tile;
    int32_t const second = 2 * tile + 1 < sizes.blocks ? partials(row + 1) : 0;
    return 2 * counts[0] + counts[1] + counts[2] + partials(row) + second;
  };
  order_by_weight(sizes.q_tiles, weight, [&](int32_t position, int32_t tile) {
    order[list * sizes.q_tiles + position] = tile;
  });
}

int64_t tiles_of(ListSizes const& sizes) {
  return static_cast<int64_t>(sizes.lists) * sizes.q_tiles;
}

}  // namespace

size_t list_plan_bytes(BlockSparse::Params const& params, ListSizes const& sizes) {
  int64_t const pairs = params.block_q == 64 ? 3 + 2 * int64_t{params.full.width} : 0;
  return static_cast<size_t>(tiles_of(sizes) * (1 + pairs)) * sizeof(int32_t);
}

ListPlan plan_lists(BlockSparse::Params const& params, ListSizes const& sizes, void* memory,
                    cudaStream_t stream) {
  int64_t const tiles = tiles_of(sizes);
  if (tiles > INT32_MAX) {
    throw std::runtime_error("sparse_fmha: query tiles of the lists must be below 2^31, got " +
                             std::to_string(tiles));
  }
  auto* const order = static_cast<int32_t*>(memory);
  int32_t* const counts = order + tiles;
  int32_t* const merged = counts + 3 * tiles;
  if (params.block_q == 64) {
    int32_t const words = ceil_div(ceil_div(params.len_kv, params.block_kv), 32);
    int32_t const bytes = 2 * words * static_cast<int32_t>(sizeof(uint32_t));
    if (bytes > kMaxBitmapBytes) {
      throw std::runtime_error("sparse_fmha: k has " + std::to_string(params.len_kv) +
                               " tokens, too many in blocks of " + std::to_string(params.block_kv) +
                               " for query blocks of 64; take larger blocks");
    }
    merge_pairs<<<static_cast<unsigned>(tiles), kWarp, bytes, stream>>>(params, sizes, words,
                                                                        merged, counts);
    check_cuda(cudaGetLastError(), "launching the merging of lists");
  }
  int64_t const groups = int64_t{sizes.lists} * order_groups(sizes.q_tiles);
  order_tiles<<<static_cast<unsigned>(groups), kOrderThreads, 0, stream>>>(params, sizes, counts,
                                                                           order);
  check_cuda(cudaGetLastError(), "launching the ordering of query tiles");
  return {order, merged, counts,
          params.batch_stride == 0 ? 0 : int64_t{sizes.heads} * sizes.q_tiles,
          params.head_stride == 0 ? 0 : int64_t{sizes.q_tiles}};
}

}  // namespace sparse_fmha::device
