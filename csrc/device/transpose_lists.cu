#include "sparse_fmha/device/transposed_lists.h"

#include <stdexcept>
#include <string>

#include "sparse_fmha/cuda/check.h"
#include "sparse_fmha/device/list_plan.h"
#include "sparse_fmha/device/order_by_weight.h"

namespace sparse_fmha::device {
namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAll = 0xffffffff;
constexpr int kBitmapWords = 1024;  // processed at a time
constexpr int kStepWarps = 8;

// Converts the lists of one row to bits. Called by a whole warp.
__device__ void mark_blocks(BlockSparse::Lists const& lists, int64_t row, int32_t key_blocks,
                            uint32_t* bitmap, uint32_t* to, int32_t words) {
  int32_t const lane = threadIdx.x;
  int32_t const count = BlockSparse::count(lists, row);
  int32_t const* const indices = lists.indices + row * lists.width;
  for (int32_t from = 0; from < words; from += kBitmapWords) {
    int32_t const size = min(kBitmapWords, words - from);
    for (int32_t i = lane; i < size; i += kWarp) {
      bitmap[i] = 0;
    }
    __syncwarp();
    for (int32_t i = lane; i < count; i += kWarp) {
      int32_t const block = indices[i];
      if (block >= 32 * from && block < min(key_blocks, 32 * (from + size))) {
        atomicOr(&bitmap[block / 32 - from], 1u << block % 32);
      }
    }
    __syncwarp();
    for (int32_t i = lane; i < size; i += kWarp) {
      to[from + i] = bitmap[i];
    }
    __syncwarp();
  }
}

// One warp per row.
__global__ void mark_rows(BlockSparse::Params params, int32_t words, uint32_t* full,
                          uint32_t* partial, int32_t* ranks, int32_t* slots) {
  __shared__ uint32_t bitmap[kBitmapWords];
  int32_t const lane = threadIdx.x;
  int64_t const row = blockIdx.x;
  int32_t const key_blocks = ceil_div(params.len_kv, params.block_kv);
  mark_blocks(params.full, row, key_blocks, bitmap, full + row * words, words);
  if (params.partial.counts == nullptr) {
    return;
  }
  partial += row * words;
  ranks += row * words;
  mark_blocks(params.partial, row, key_blocks, bitmap, partial, words);
  int32_t before = 0;
  for (int32_t from = 0; from < words; from += kWarp) {
    int32_t const mine = from + lane < words ? __popc(partial[from + lane]) : 0;
    int32_t end = mine;
    for (int32_t step = 1; step < kWarp; step *= 2) {
      int32_t const others = __shfl_up_sync(kAll, end, step);
      end += lane >= step ? others : 0;
    }
    if (from + lane < words) {
      ranks[from + lane] = before + end - mine;
    }
    before += __shfl_sync(kAll, end, kWarp - 1);
  }
  __syncwarp();
  int64_t const first = row * params.partial.width;
  int32_t const count = BlockSparse::count(params.partial, row);
  for (int32_t i = lane; i < count; i += kWarp) {
    int32_t const block = params.partial.indices[first + i];
    if (block >= 0 && block < key_blocks) {
      int32_t const word = block / 32;
      slots[first + ranks[word] + __popc(partial[word] & first_columns(block % 32))] = i;
    }
  }
}

// A warp handles 32 steps and the parts of 32 key blocks. The warps of a thread block handle
// neighboring steps.
__global__ void mark_steps(BlockSparse::Params params, int32_t blocks, TransposedLists lists,
                           uint32_t* seen, uint32_t* masked) {
  int32_t const groups = ceil_div(lists.step_words, kStepWarps);
  int64_t index = blockIdx.x;
  int32_t const step_word =
      static_cast<int32_t>(index % groups) * kStepWarps + static_cast<int32_t>(threadIdx.x) / kWarp;
  index /= groups;
  int32_t const word = static_cast<int32_t>(index % lists.words);
  int64_t const list = index / lists.words;
  int32_t const step = step_word * 32 + static_cast<int32_t>(threadIdx.x) % kWarp;
  if (step_word >= lists.step_words) {
    return;
  }
  bool const there = step * int64_t{kStepRows} < params.len_q;
  int64_t const at =
      (list * blocks + step * kStepRows / params.block_q) * int64_t{lists.words} + word;
  uint32_t const full = there ? lists.full[at] : 0;
  uint32_t const partial = there && params.partial.counts != nullptr ? lists.partial[at] : 0;
  int32_t const first_part = word * (32 * params.block_kv / kPartKeys);
  int32_t const count = min(32 * params.block_kv / kPartKeys, lists.parts - first_part);
  for (int32_t i = 0; i < count; ++i) {
    PartUse const use = part_use(params, first_part + i, step, full, partial);
    uint32_t const steps_seen = __ballot_sync(kAll, use.seen);
    uint32_t const steps_masked = __ballot_sync(kAll, use.masked);
    if (threadIdx.x % kWarp == 0) {
      int64_t const to = (list * lists.parts + first_part + i) * lists.step_words + step_word;
      seen[to] = steps_seen;
      masked[to] = steps_masked;
    }
  }
}

// One warp counts the steps of one key tile, over the query heads that share it.
__global__ void count_steps(TransposedLists lists, int32_t heads_per_kv, int32_t parts_per_tile,
                            int32_t* counts) {
  int64_t const tile = blockIdx.x % lists.key_tiles;
  int64_t const list_kv = blockIdx.x / lists.key_tiles;
  // If heads share a list, it is counted as the first head's.
  int64_t const first_list = lists.head_stride == 0 ? list_kv : list_kv * heads_per_kv;
  int32_t steps[3] = {};
  for (int32_t head = 0; head < heads_per_kv; ++head) {
    int64_t const part =
        (first_list + head * lists.head_stride) * lists.parts + tile * parts_per_tile;
    uint32_t const* const seen = lists.seen + part * lists.step_words;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < lists.step_words; i += kWarp) {
      uint32_t const first = seen[i];
      uint32_t const second = parts_per_tile == 2 ? seen[lists.step_words + i] : 0;
      steps[0] += __popc(first | second);
      steps[1] += __popc(first);
      steps[2] += __popc(second);
    }
  }
  for (int32_t i = 0; i < 3; ++i) {
    int32_t const sum = __reduce_add_sync(kAll, steps[i]);
    if (threadIdx.x == 0) {
      counts[int64_t{blockIdx.x} * 3 + i] = sum;
    }
  }
}

__global__ void __launch_bounds__(kOrderThreads)
    order_key_tiles(int32_t key_tiles, int32_t const* counts, int32_t* order) {
  int64_t const first = int64_t{blockIdx.x / order_groups(key_tiles)} * key_tiles;
  auto weight = [&](int32_t tile) {
    int32_t const* const steps = counts + 3 * (first + tile);
    return steps[1] + steps[2];
  };
  order_by_weight(key_tiles, weight, order + first);
}

// Grid size of a launch, checked.
unsigned blocks_of(int64_t count) {
  if (count > INT32_MAX) {
    throw std::runtime_error(
        "sparse_fmha: blocks of the lists to transpose must be at most 2^31 - 1, got " +
        std::to_string(count));
  }
  return static_cast<unsigned>(count);
}

}  // namespace

TransposedLists transpose_lists(FmhaProblem const& problem, int32_t parts_per_tile,
                                ExecutionContext const& context) {
  auto const& params = std::get<BlockSparse::Params>(problem.sparsity);
  ListSizes const sizes = list_sizes(params, problem.batch, problem.heads_q);
  bool const shared_heads = params.head_stride == 0;
  int32_t const heads_kv = shared_heads ? 1 : problem.heads_kv;
  TransposedLists lists = {};
  lists.words = ceil_div(ceil_div(params.len_kv, params.block_kv), 32);
  lists.step_words = ceil_div(ceil_div(params.len_q, kStepRows), 32);
  lists.key_tiles = ceil_div(params.len_kv, parts_per_tile * kPartKeys);
  lists.parts = lists.key_tiles * parts_per_tile;
  lists.head_stride = shared_heads ? 0 : 1;
  lists.batch_stride = params.batch_stride == 0 ? 0 : sizes.heads;
  lists.batch_stride_kv = params.batch_stride == 0 ? 0 : heads_kv;

  int64_t const rows = int64_t{sizes.lists} * sizes.blocks;
  int64_t const tiles = int64_t{sizes.lists / sizes.heads} * heads_kv * lists.key_tiles;
  int64_t const steps = int64_t{sizes.lists} * lists.parts * lists.step_words;
  bool const has_partial = params.partial.counts != nullptr;
  auto allocate = [&](int64_t count) {
    return static_cast<int32_t*>(
        context.memory->allocate(static_cast<size_t>(count) * sizeof(int32_t)));
  };
  auto bits = [&](int64_t count) { return reinterpret_cast<uint32_t*>(allocate(count)); };
  uint32_t* const full = bits(rows * lists.words);
  uint32_t* const partial = has_partial ? bits(rows * lists.words) : nullptr;
  int32_t* const ranks = has_partial ? allocate(rows * lists.words) : nullptr;
  int32_t* const slots = has_partial ? allocate(rows * params.partial.width) : nullptr;
  uint32_t* const seen = bits(2 * steps);
  uint32_t* const masked = seen + steps;
  int32_t* const counts = allocate(4 * tiles);
  int32_t* const order = counts + 3 * tiles;
  lists.full = full;
  lists.partial = partial;
  lists.ranks = ranks;
  lists.slots = slots;
  lists.seen = seen;
  lists.masked = masked;
  lists.counts = counts;
  lists.order = order;

  auto* const stream = static_cast<cudaStream_t>(context.stream);
  mark_rows<<<blocks_of(rows), kWarp, 0, stream>>>(params, lists.words, full, partial, ranks,
                                                   slots);
  check_cuda(cudaGetLastError(), "launching the marking of key blocks");
  int64_t const groups =
      int64_t{sizes.lists} * lists.words * ceil_div(lists.step_words, kStepWarps);
  mark_steps<<<blocks_of(groups), kStepWarps * kWarp, 0, stream>>>(params, sizes.blocks, lists,
                                                                   seen, masked);
  check_cuda(cudaGetLastError(), "launching the marking of query steps");
  count_steps<<<blocks_of(tiles), kWarp, 0, stream>>>(lists, problem.heads_q / problem.heads_kv,
                                                      parts_per_tile, counts);
  check_cuda(cudaGetLastError(), "launching the counting of query steps");
  int64_t const ordered = tiles / lists.key_tiles * order_groups(lists.key_tiles);
  order_key_tiles<<<blocks_of(ordered), kOrderThreads, 0, stream>>>(lists.key_tiles, counts, order);
  check_cuda(cudaGetLastError(), "launching the ordering of key tiles");
  return lists;
}

}  // namespace sparse_fmha::device
