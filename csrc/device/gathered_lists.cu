// Block lists over copies of the keys that groups of query rows list.
#include "sparse_fmha/device/allocate.h"
#include "sparse_fmha/device/gathered_keys.h"
#include "sparse_fmha/device/list_plan.h"
#include "sparse_fmha/device/transposed_lists.h"
#include "sparse_fmha/device/warp_rows.h"

namespace sparse_fmha::device {
namespace {

struct Ranked {
  uint32_t const* listed;
  int32_t* ranks;
  int32_t* tokens;
  int32_t* counts;
  int64_t rows;
  int32_t words;
  int32_t capacity;
};

constexpr int32_t kSegment = 128;  // words of a row that a warp has

// A warp numbers the keys of a segment; it counts those before.
__global__ void __launch_bounds__(kRowThreads) rank_keys(Ranked const p) {
  int32_t const segments = ceil_div(p.words, kSegment);
  int64_t const index = row_of_warp();
  int64_t const row = index / segments;
  if (row >= p.rows) {
    return;
  }
  auto const segment = static_cast<int32_t>(index % segments);
  auto const lane = static_cast<int32_t>(threadIdx.x % kWarp);
  uint32_t const* const listed = p.listed + row * p.words;
  int32_t* const tokens = p.tokens + row * p.capacity;
  int32_t const begin = segment * kSegment;
  int32_t before = 0;
  for (int32_t word = lane; word < begin; word += kWarp) {
    before += __popc(listed[word]);
  }
  before = __reduce_add_sync(kAllLanes, before);
  for (int32_t first = begin; first < min(begin + kSegment, p.words); first += kWarp) {
    int32_t const word = first + lane;
    uint32_t const bits = word < p.words ? listed[word] : 0;
    int32_t end = __popc(bits);
    for (int32_t step = 1; step < kWarp; step *= 2) {
      int32_t const others = __shfl_up_sync(kAllLanes, end, step);
      end += lane >= step ? others : 0;
    }
    int32_t const rank = before + end - __popc(bits);
    if (word < p.words) {
      p.ranks[row * p.words + word] = rank;
    }
    for (uint32_t lanes = __ballot_sync(kAllLanes, bits != 0); lanes != 0; lanes &= lanes - 1) {
      int const source = __ffs(lanes) - 1;
      uint32_t const keys = __shfl_sync(kAllLanes, bits, source);
      int32_t const place =
          __shfl_sync(kAllLanes, rank, source) + __popc(keys & ((1u << lane) - 1));
      if ((keys >> lane & 1) != 0) {
        tokens[place] = 32 * (first + source) + lane;
      }
    }
    before += __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  if (segment + 1 < segments) {
    return;
  }
  for (int32_t i = before + lane; i < p.capacity; i += kWarp) {
    tokens[i] = kNoToken;
  }
  if (lane == 0) {
    p.counts[row] = before;
  }
}

struct Blocks {
  Stripe::Params stripe;
  int32_t const* tokens;
  int32_t const* keys;  // of each group
  int32_t capacity;
  int32_t groups;
  int32_t rows;  // of a block of queries
  int32_t query_blocks;
  int64_t lists;
  int32_t* full;
  int32_t* partial;
  int32_t* full_counts;
  int32_t* partial_counts;
  uint32_t* bits;
  int32_t partial_width;
};

// A warp writes a bitmask.
__device__ void write_bits(Blocks const& p, int32_t first_row, int32_t const* tokens,
                           uint32_t* bits) {
  constexpr int32_t kWords = kGatheredBlock / 32;
  auto const lane = static_cast<int32_t>(threadIdx.x % kWarp);
  for (int32_t word = 0; word < kWords; ++word) {
    int32_t const token = tokens[32 * word + lane];
    for (int32_t first = 0; first < p.rows; first += kWarp) {
      uint32_t mine = 0;
      for (int32_t i = 0; i < kWarp; ++i) {
        uint32_t const seen =
            __ballot_sync(kAllLanes, token < Stripe::limit(p.stripe, first_row + first + i));
        mine = lane == i ? seen : mine;
      }
      bits[(first + lane) * kWords + word] = mine;
    }
  }
}

// A warp lists the blocks of copies that a block of query rows sees.
__global__ void __launch_bounds__(kRowThreads) list_blocks(Blocks const p) {
  int64_t const row = row_of_warp();
  int64_t const list = row / p.query_blocks;
  if (list >= p.lists) {
    return;
  }
  auto const lane = static_cast<int32_t>(threadIdx.x % kWarp);
  int32_t const first_row = static_cast<int32_t>(row % p.query_blocks) * p.rows;
  int32_t const group = first_row / p.stripe.block_q;
  int64_t const lists_row = list * p.groups + group;
  int32_t const* const tokens = p.tokens + lists_row * p.capacity;
  int32_t const keys = p.keys[lists_row];
  int32_t const blocks = p.capacity / kGatheredBlock;
  int32_t full = 0;
  int32_t partial = 0;
  for (int32_t first = 0; first * kGatheredBlock < keys; first += kWarp) {
    int32_t const block = first + lane;
    int32_t const count = min(keys - block * kGatheredBlock, kGatheredBlock);
    GatheredUse use = GatheredUse::kNone;
    if (count > 0) {
      int32_t const* const of_block = tokens + block * kGatheredBlock;
      use = gathered_use(p.stripe, first_row, p.rows, of_block[0], of_block[count - 1], count);
    }
    uint32_t const whole = __ballot_sync(kAllLanes, use == GatheredUse::kFull);
    uint32_t const cut = __ballot_sync(kAllLanes, use == GatheredUse::kPartial);
    uint32_t const earlier = (1u << lane) - 1;
    if (use == GatheredUse::kFull) {
      p.full[row * blocks + full + __popc(whole & earlier)] = group * blocks + block;
    }
    for (uint32_t left = cut; left != 0; left &= left - 1) {
      int32_t const found = first + __ffs(left) - 1;
      int64_t const place = row * p.partial_width + partial;
      if (lane == 0) {
        p.partial[place] = group * blocks + found;
      }
      write_bits(p, first_row, tokens + found * kGatheredBlock,
                 p.bits + place * p.rows * (kGatheredBlock / 32));
      ++partial;
    }
    full += __popc(whole);
  }
  if (lane == 0) {
    p.full_counts[row] = full;
    p.partial_counts[row] = partial;
  }
}

}  // namespace

ListedKeys list_keys(FmhaProblem const& problem, ExecutionContext const& context) {
  auto const& stripe = std::get<Stripe::Params>(problem.sparsity);
  auto* const stream = static_cast<cudaStream_t>(context.stream);
  ListSizes const sizes = list_sizes(stripe, problem.batch, problem.heads_q);
  int32_t const groups = sizes.blocks;
  int32_t const blocks = blocks_of_group(stripe);

  Ranked ranked = {};
  ranked.rows = int64_t{sizes.lists} * groups;
  ranked.words = ceil_div(stripe.len_kv, 32);
  ranked.capacity = blocks * kGatheredBlock;
  ranked.listed = mark_listed_keys(stripe, ranked.rows, context);
  ranked.ranks = allocate<int32_t>(context, ranked.rows * ranked.words);
  ranked.tokens = allocate<int32_t>(context, ranked.rows * ranked.capacity);
  ranked.counts = allocate<int32_t>(context, ranked.rows);
  int64_t const warps = ranked.rows * ceil_div(ranked.words, kSegment);
  rank_keys<<<row_blocks(warps, "the groups of stripes"), kRowThreads, 0, stream>>>(ranked);
  check_cuda(cudaGetLastError(), "launching the numbering of listed keys");

  Blocks lists = {};
  lists.stripe = stripe;
  lists.tokens = ranked.tokens;
  lists.keys = ranked.counts;
  lists.capacity = ranked.capacity;
  lists.groups = groups;
  lists.rows = gathered_rows(stripe);
  lists.query_blocks = ceil_div(stripe.len_q, lists.rows);
  lists.lists = sizes.lists;
  lists.partial_width = most_partial(stripe);
  int64_t const rows = lists.lists * lists.query_blocks;
  lists.full = allocate<int32_t>(context, rows * blocks);
  lists.full_counts = allocate<int32_t>(context, rows);
  lists.partial = allocate<int32_t>(context, rows * lists.partial_width);
  lists.partial_counts = allocate<int32_t>(context, rows);
  int64_t const bits = int64_t{lists.rows} * (kGatheredBlock / 32);
  lists.bits = allocate<uint32_t>(context, rows * lists.partial_width * bits);
  list_blocks<<<row_blocks(rows, "the blocks of query rows"), kRowThreads, 0, stream>>>(lists);
  check_cuda(cudaGetLastError(), "launching the listing of blocks of copies");

  ListedKeys found = {};
  found.listed = ranked.listed;
  found.ranks = ranked.ranks;
  found.tokens = ranked.tokens;
  found.counts = ranked.counts;
  found.words = ranked.words;
  found.capacity = ranked.capacity;
  BlockSparse::Params& over = found.blocks;
  over.len_q = stripe.len_q;
  over.len_kv = groups * ranked.capacity;
  over.block_q = lists.rows;
  over.block_kv = kGatheredBlock;
  over.full = {lists.full_counts, lists.full, blocks};
  over.partial = {lists.partial_counts, lists.partial, lists.partial_width};
  over.bits = reinterpret_cast<uint8_t const*>(lists.bits);
  over.head_stride = stripe.head_stride == 0 ? 0 : lists.query_blocks;
  over.batch_stride = stripe.batch_stride == 0 ? 0 : int64_t{sizes.heads} * lists.query_blocks;
  return found;
}

}  // namespace sparse_fmha::device
