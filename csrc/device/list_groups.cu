#include "sparse_fmha/device/list_groups.h"

#include <stdexcept>
#include <string>

#include "sparse_fmha/cuda/check.h"
#include "sparse_fmha/device/order_by_weight.h"

namespace sparse_fmha::device {
namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAll = 0xffffffff;
constexpr int32_t kMembers = ListGroup::kMembers;
constexpr int32_t kSets = ListGroup::kSets;

// One warp per group, with a bitmap of the key blocks for each member in shared memory.
__global__ void merge_groups(BlockSparse::Params params, GroupSizes sizes, int32_t words,
                             GroupEntry* entries, int32_t* counts, int32_t* weights) {
  extern __shared__ uint32_t bitmaps[];  // [kMembers, words]
  int32_t const lane = threadIdx.x;
  int64_t const group = blockIdx.x;
  int32_t const first_block = static_cast<int32_t>(group % sizes.groups) * kMembers;
  for (int32_t i = lane; i < kMembers * words; i += kWarp) {
    bitmaps[i] = 0;
  }
  __syncwarp();
  int32_t const parts = params.block_kv / ListGroup::kBlock;
  for (int32_t w = 0; w < kMembers && first_block + w < sizes.blocks; ++w) {
    int64_t const row = group / sizes.groups * sizes.blocks + first_block + w;
    int32_t const count = BlockSparse::count(params.full, row);
    int32_t const* const indices = params.full.indices + row * params.full.width;
    for (int32_t i = lane; i < count; i += kWarp) {
      int32_t const index = indices[i];
      if (index < 0 || index >= ceil_div(params.len_kv, params.block_kv)) {
        continue;
      }
      for (int32_t part = 0; part < parts; ++part) {
        int32_t const block = index * parts + part;
        if (block < sizes.key_blocks) {
          atomicOr(&bitmaps[w * words + block / 32], 1u << block % 32);
        }
      }
    }
  }
  __syncwarp();

  // The key block that ends behind the last key goes first, where the kernel masks.
  int32_t const last = sizes.key_blocks - 1;
  bool const is_cut = params.len_kv % ListGroup::kBlock != 0;
  auto bit_of_last = [&](int32_t w) {
    return static_cast<int32_t>(bitmaps[w * words + last / 32] >> last % 32 & 1);
  };
  int32_t cut = 0;  // its members
  for (int32_t w = 0; w < kMembers; ++w) {
    cut |= is_cut ? bit_of_last(w) << w : 0;
  }
  __syncwarp();
  if (cut != 0 && lane == 0) {
    for (int32_t w = 0; w < kMembers; ++w) {
      bitmaps[w * words + last / 32] &= ~(1u << last % 32);
    }
  }
  __syncwarp();

  // The key blocks of one word that exactly the members of a set see.
  auto in_set = [&](int32_t word, int32_t set) {
    uint32_t bits = word < words ? kAll : 0;
    for (int32_t w = 0; w < kMembers; ++w) {
      uint32_t const own = word < words ? bitmaps[w * words + word] : 0;
      bits &= set >> w & 1 ? own : ~own;
    }
    return bits;
  };
  int32_t totals[kSets] = {};
  int32_t count = cut != 0 ? 1 : 0;
  int32_t weight = __popc(cut);
  for (int32_t set = 1; set < kSets; ++set) {
    int32_t total = 0;
    for (int32_t word = lane; word < words; word += kWarp) {
      total += __popc(in_set(word, set));
    }
    totals[set] = __reduce_add_sync(kAll, total);
    count += totals[set];
    weight += totals[set] * __popc(set);
  }
  GroupEntry* const to = entries + group * sizes.width;
  if (lane == 0) {
    counts[group] = count;
    weights[group] = weight;
    if (cut != 0) {
      to[0] = GroupEntry::of(last, cut);
    }
  }
  for (int32_t set = 1; set < kSets; ++set) {
    int32_t passed = 0;
    for (int32_t first = 0; first < words; first += kWarp) {
      uint32_t bits = in_set(first + lane, set);
      int32_t const mine = __popc(bits);
      int32_t end = mine;
      for (int32_t step = 1; step < kWarp; step *= 2) {
        int32_t const before = __shfl_up_sync(kAll, end, step);
        end += lane >= step ? before : 0;
      }
      for (int32_t rank = passed + end - mine; bits != 0; ++rank) {
        to[(cut != 0) + spread_place(totals, set, rank)] =
            GroupEntry::of((first + lane) * 32 + __ffs(bits) - 1, set);
        bits &= bits - 1;
      }
      passed += __shfl_sync(kAll, end, kWarp - 1);
    }
  }
}

__global__ void __launch_bounds__(kOrderThreads)
    order_groups_of_lists(int32_t groups, int32_t const* weights, int32_t* order) {
  int64_t const list = blockIdx.x / order_groups(groups);
  order_by_weight(
      groups, [&](int32_t group) { return weights[list * groups + group]; }, order + list * groups);
}

int64_t all_groups(GroupSizes const& sizes) { return int64_t{sizes.lists} * sizes.groups; }

}  // namespace

bool can_group(BlockSparse::Params const& params) {
  return params.block_q == ListGroup::kBlock && params.block_kv >= ListGroup::kBlock &&
         params.partial.counts == nullptr && !params.causal &&
         ceil_div(params.len_kv, ListGroup::kBlock) <= ListGroup::kMaxKeyBlocks;
}

GroupSizes group_sizes(BlockSparse::Params const& p, int32_t batch, int32_t heads) {
  int32_t const own_heads = p.head_stride == 0 ? 1 : heads;
  int32_t const blocks = ceil_div(p.len_q, ListGroup::kBlock);
  int32_t const groups = ceil_div(blocks, ListGroup::kMembers);
  int32_t const key_blocks = ceil_div(p.len_kv, ListGroup::kBlock);
  int64_t const most =
      int64_t{ListGroup::kMembers} * p.full.width * (p.block_kv / ListGroup::kBlock);
  return {(p.batch_stride == 0 ? 1 : batch) * own_heads,
          blocks,
          groups,
          key_blocks,
          most < key_blocks ? static_cast<int32_t>(most) : key_blocks,
          p.batch_stride == 0 ? 0 : int64_t{own_heads} * groups,
          p.head_stride == 0 ? 0 : int64_t{groups}};
}

size_t group_plan_bytes(GroupSizes const& sizes) {
  return static_cast<size_t>(all_groups(sizes)) * (3 + size_t(sizes.width)) * sizeof(int32_t);
}

GroupPlan plan_groups(BlockSparse::Params const& params, GroupSizes const& sizes, void* memory,
                      cudaStream_t stream) {
  int64_t const groups = all_groups(sizes);
  if (groups > INT32_MAX) {
    throw std::runtime_error("sparse_fmha: query tiles of the lists must be below 2^31, got " +
                             std::to_string(groups));
  }
  auto* const order = static_cast<int32_t*>(memory);
  int32_t* const counts = order + groups;
  int32_t* const weights = counts + groups;
  auto* const entries = reinterpret_cast<GroupEntry*>(weights + groups);
  int32_t const words = ceil_div(sizes.key_blocks, 32);
  int32_t const bytes = kMembers * words * static_cast<int32_t>(sizeof(uint32_t));
  merge_groups<<<static_cast<unsigned>(groups), kWarp, bytes, stream>>>(params, sizes, words,
                                                                        entries, counts, weights);
  check_cuda(cudaGetLastError(), "launching the merging of lists");
  int64_t const parts = int64_t{sizes.lists} * order_groups(sizes.groups);
  order_groups_of_lists<<<static_cast<unsigned>(parts), kOrderThreads, 0, stream>>>(sizes.groups,
                                                                                    weights, order);
  check_cuda(cudaGetLastError(), "launching the ordering of groups");
  return {order, counts, entries};
}

}  // namespace sparse_fmha::device
