#include "sparse_fmha/device/transposed_lists.h"

#include <stdexcept>
#include <string>

#include "sparse_fmha/cuda/check.h"
#include "sparse_fmha/device/allocate.h"
#include "sparse_fmha/device/list_plan.h"
#include "sparse_fmha/device/order_by_weight.h"

namespace sparse_fmha::device {
namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAll = 0xffffffff;
constexpr int kBitmapWords = 1024;  // processed at a time
constexpr int kStepWarps = 8;
constexpr int kWarpParts = 16;
constexpr int kColumnThreads = 256;

// Fills a row of a bitmap in pieces; called by a whole thread block. put(from, end, set) calls
// set(bit, bits) for the bits of [from, end), which are in shared memory.
template <class Put>
__device__ void fill_bitmap(uint32_t* row, int32_t words, Put const& put) {
  __shared__ uint32_t bitmap[kBitmapWords];
  auto const thread = static_cast<int32_t>(threadIdx.x);
  auto const threads = static_cast<int32_t>(blockDim.x);
  for (int32_t first = 0; first < words; first += kBitmapWords) {
    int32_t const size = min(kBitmapWords, words - first);
    for (int32_t i = thread; i < size; i += threads) {
      bitmap[i] = 0;
    }
    __syncthreads();
    put(32 * first, 32 * (first + size),
        [&](int32_t bit, uint32_t bits) { atomicOr(&bitmap[bit / 32 - first], bits << bit % 32); });
    __syncthreads();
    for (int32_t i = thread; i < size; i += threads) {
      row[first + i] = bitmap[i];
    }
    __syncthreads();
  }
}

// Converts the lists of one row to bits. Called by a whole thread block.
__device__ void mark_blocks(BlockSparse::Lists const& lists, int64_t row, int32_t key_blocks,
                            uint32_t* to, int32_t words) {
  int32_t const count = BlockSparse::count(lists, row);
  int32_t const* const indices = lists.indices + row * lists.width;
  fill_bitmap(to, words, [&](int32_t from, int32_t end, auto set) {
    for (auto i = static_cast<int32_t>(threadIdx.x); i < count; i += blockDim.x) {
      int32_t const block = indices[i];
      if (block >= from && block < min(key_blocks, end)) {
        set(block, 1);
      }
    }
  });
}

// One thread block per row marks the keys that the row lists.
__global__ void __launch_bounds__(kColumnThreads)
    mark_keys(Stripe::Params params, int32_t words, uint32_t* full) {
  int64_t const row = blockIdx.x;
  StripeStream const lists = stripe_stream(params, row);
  fill_bitmap(full + row * words, words, [&](int32_t from, int32_t end, auto set) {
    for (auto i = static_cast<int32_t>(threadIdx.x); i < lists.num_columns; i += blockDim.x) {
      int32_t const key = lists.columns[i];
      if (key >= from && key < min(params.len_kv, end)) {
        set(key, 1);
      }
    }
    for (auto i = static_cast<int32_t>(threadIdx.x); i < lists.num_runs; i += blockDim.x) {
      int32_t const start = lists.runs[i];
      if (start < 0 || start >= params.len_kv) {
        continue;
      }
      int32_t const stop = min(min(start + params.range_size, params.len_kv), end);
      for (int32_t key = max(start, from); key < stop; key = key / 32 * 32 + 32) {
        set(key, first_columns(stop - key));
      }
    }
  });
}

// One warp per row.
__global__ void mark_rows(BlockSparse::Params params, int32_t words, uint32_t* full,
                          uint32_t* partial, int32_t* ranks, int32_t* slots) {
  int32_t const lane = threadIdx.x;
  int64_t const row = blockIdx.x;
  int32_t const key_blocks = ceil_div(params.len_kv, params.block_kv);
  mark_blocks(params.full, row, key_blocks, full + row * words, words);
  if (params.partial.counts == nullptr) {
    return;
  }
  partial += row * words;
  ranks += row * words;
  mark_blocks(params.partial, row, key_blocks, partial, words);
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

// A warp handles 32 steps and kWarpParts parts. The warps of a thread block handle neighboring
// steps.
template <class Params>
__global__ void mark_steps(Params params, TransposedLists lists, uint32_t* seen, uint32_t* masked) {
  int32_t const groups = ceil_div(lists.step_words, kStepWarps);
  int32_t const units = ceil_div(lists.parts, kWarpParts);
  int64_t index = blockIdx.x;
  int32_t const step_word =
      static_cast<int32_t>(index % groups) * kStepWarps + static_cast<int32_t>(threadIdx.x) / kWarp;
  index /= groups;
  int32_t const first_part = static_cast<int32_t>(index % units) * kWarpParts;
  int64_t const list = index / units;
  int32_t const step = step_word * 32 + static_cast<int32_t>(threadIdx.x) % kWarp;
  if (step_word >= lists.step_words) {
    return;
  }
  bool const there = step * int64_t{kStepRows} < params.len_q;
  int64_t const row =
      list * ceil_div(params.len_q, params.block_q) + step * kStepRows / params.block_q;
  for (int32_t part = first_part; part < min(first_part + kWarpParts, lists.parts); ++part) {
    bool const any = there && part * int64_t{kPartKeys} < params.len_kv;
    PartUse const use = any ? part_use(params, lists, row, part, step) : PartUse{};
    uint32_t const steps_seen = __ballot_sync(kAll, use.seen);
    uint32_t const steps_masked = __ballot_sync(kAll, use.masked);
    if (threadIdx.x % kWarp == 0) {
      int64_t const to = (list * lists.parts + part) * lists.step_words + step_word;
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
  order_by_weight(key_tiles, weight,
                  [&](int32_t position, int32_t tile) { order[first + position] = tile; });
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

struct Memory {
  ExecutionContext const& context;
  int32_t* ints(int64_t count) const { return allocate<int32_t>(context, count); }
  uint32_t* bits(int64_t words) const { return reinterpret_cast<uint32_t*>(ints(words)); }
};

void launch_rows(BlockSparse::Params const& params, FmhaProblem const& problem, int64_t rows,
                 TransposedLists& lists, Memory const& memory, cudaStream_t stream) {
  lists.words = ceil_div(ceil_div(params.len_kv, params.block_kv), 32);
  if (problem.kept_blocks != nullptr) {  // bits already
    lists.full = problem.kept_blocks;
    return;
  }
  bool const has_partial = params.partial.counts != nullptr;
  uint32_t* const full = memory.bits(rows * lists.words);
  uint32_t* const partial = has_partial ? memory.bits(rows * lists.words) : nullptr;
  int32_t* const ranks = has_partial ? memory.ints(rows * lists.words) : nullptr;
  int32_t* const slots = has_partial ? memory.ints(rows * params.partial.width) : nullptr;
  mark_rows<<<blocks_of(rows), kWarp, 0, stream>>>(params, lists.words, full, partial, ranks,
                                                   slots);
  lists.full = full;
  lists.partial = partial;
  lists.ranks = ranks;
  lists.slots = slots;
}

void launch_rows(Stripe::Params const& params, FmhaProblem const& /*problem*/, int64_t rows,
                 TransposedLists& lists, Memory const& memory, cudaStream_t /*stream*/) {
  lists.words = ceil_div(params.len_kv, 32);
  lists.full = mark_listed_keys(params, rows, memory.context);
}

}  // namespace

uint32_t const* mark_listed_keys(Stripe::Params const& params, int64_t rows,
                                 ExecutionContext const& context) {
  int32_t const words = ceil_div(params.len_kv, 32);
  uint32_t* const listed = Memory{context}.bits(rows * words);
  mark_keys<<<blocks_of(rows), kColumnThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(
      params, words, listed);
  check_cuda(cudaGetLastError(), "launching the marking of listed keys");
  return listed;
}

template <class Params>
TransposedLists transpose_lists(Params const& params, FmhaProblem const& problem,
                                int32_t parts_per_tile, ExecutionContext const& context) {
  Memory const memory{context};
  auto* const stream = static_cast<cudaStream_t>(context.stream);
  ListSizes const sizes = list_sizes(params, problem.batch, problem.heads_q);
  bool const shared_heads = params.head_stride == 0;
  bool const shared_batch = params.batch_stride == 0;
  int32_t const heads_kv = shared_heads ? 1 : problem.heads_kv;
  TransposedLists lists = {};
  lists.step_words = ceil_div(ceil_div(params.len_q, kStepRows), 32);
  lists.key_tiles = ceil_div(params.len_kv, parts_per_tile * kPartKeys);
  lists.parts = lists.key_tiles * parts_per_tile;
  lists.head_stride = shared_heads ? 0 : 1;
  lists.batch_stride = shared_batch ? 0 : sizes.heads;
  lists.batch_stride_kv = shared_batch ? 0 : heads_kv;

  launch_rows(params, problem, int64_t{sizes.lists} * sizes.blocks, lists, memory, stream);
  check_cuda(cudaGetLastError(), "launching the marking of listed keys");

  int64_t const steps = int64_t{sizes.lists} * lists.parts * lists.step_words;
  uint32_t* const seen = memory.bits(2 * steps);
  uint32_t* const masked = seen + steps;
  int64_t const groups = int64_t{sizes.lists} * ceil_div(lists.parts, kWarpParts) *
                         ceil_div(lists.step_words, kStepWarps);
  mark_steps<<<blocks_of(groups), kStepWarps * kWarp, 0, stream>>>(params, lists, seen, masked);
  check_cuda(cudaGetLastError(), "launching the marking of query steps");
  lists.seen = seen;
  lists.masked = masked;

  int64_t const lists_kv = int64_t{sizes.lists / sizes.heads} * heads_kv;
  int64_t const tiles = lists_kv * lists.key_tiles;
  int32_t* const counts = memory.ints(4 * tiles);
  int32_t* const order = counts + 3 * tiles;
  count_steps<<<blocks_of(tiles), kWarp, 0, stream>>>(lists, problem.heads_q / problem.heads_kv,
                                                      parts_per_tile, counts);
  check_cuda(cudaGetLastError(), "launching the counting of query steps");
  order_key_tiles<<<blocks_of(lists_kv * order_groups(lists.key_tiles)), kOrderThreads, 0,
                    stream>>>(lists.key_tiles, counts, order);
  check_cuda(cudaGetLastError(), "launching the ordering of key tiles");
  lists.counts = counts;
  lists.order = order;
  return lists;
}

template TransposedLists transpose_lists(BlockSparse::Params const&, FmhaProblem const&, int32_t,
                                         ExecutionContext const&);
template TransposedLists transpose_lists(Stripe::Params const&, FmhaProblem const&, int32_t,
                                         ExecutionContext const&);

}  // namespace sparse_fmha::device
