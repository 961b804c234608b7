// Lists of what each group of 64 query rows kept of block lists and stripes.
#include "sparse_fmha/planning/kept_lists.h"

#include "sparse_fmha/device/allocate.h"
#include "sparse_fmha/device/kept_tiles.h"
#include "sparse_fmha/device/list_plan.h"
#include "sparse_fmha/device/warp_rows.h"
#include "sparse_fmha/planning/skip_bits.h"

namespace sparse_fmha::device {
namespace {

// The groups of a problem, each of which has lists of its own, by a warp.
struct KeptGroups {
  uint32_t const* skipped;  // [rows, words]
  int64_t rows;             // [batch, heads, groups]
  int32_t heads;
  int32_t groups;
  int32_t words;

  int64_t row;
  int32_t group;
  int32_t head;
  int32_t batch;

  // Returns whether there is a group for this warp.
  __device__ bool find() {
    row = row_of_warp();
    group = static_cast<int32_t>(row % groups);
    head = static_cast<int32_t>(row / groups % heads);
    batch = static_cast<int32_t>(row / groups / heads);
    return row < rows;
  }
  __device__ uint32_t const* bits() const { return skipped + row * words; }
};

// A list that a warp writes.
struct Written {
  int32_t* indices;
  int32_t count = 0;
  // Appends the numbers of the lanes that are there; returns the place of the lane's.
  __device__ int32_t append(bool there, int32_t number) {
    uint32_t const lanes = __ballot_sync(kAllLanes, there);
    int32_t const place = count + __popc(lanes & ((1u << threadIdx.x % kWarp) - 1));
    if (there) {
      indices[place] = number;
    }
    count += __popc(lanes);
    return place;
  }
};

// Lists that are being written, [rows] and [rows, width].
struct NewLists {
  int32_t* counts;
  int32_t* indices;
  int32_t width;
  __device__ Written of(int64_t row) const { return {indices + row * width}; }
  __device__ void end(int64_t row, Written const& list) const {
    if (threadIdx.x % kWarp == 0) {
      counts[row] = list.count;
    }
  }
};

// Copies 64 rows of a box's bitmask, 16 keys at a time. from_row, to_row: bytes of a row.
__device__ void copy_bits(uint8_t const* from, int32_t from_row, uint8_t* to, int32_t to_row) {
  int32_t const pieces = to_row / 2;
  for (auto i = static_cast<int32_t>(threadIdx.x % kWarp); i < 64 * pieces; i += kWarp) {
    int32_t const row = i / pieces;
    int32_t const byte = 2 * (i % pieces);
    *reinterpret_cast<uint16_t*>(to + row * to_row + byte) =
        *reinterpret_cast<uint16_t const*>(from + row * from_row + byte);
  }
}

__global__ void __launch_bounds__(kRowThreads)
    keep_blocks(BlockSparse::Params const p, ListPlan const plan, BoxSizes const sizes,
                KeptGroups at, NewLists const fulls, NewLists const partials, uint8_t* bits) {
  if (!at.find()) {
    return;
  }
  auto const stages = group_stages(p, plan, sizes, at.batch, at.head, at.group, at.bits());
  int32_t const box_row = (1 << sizes.log2_box) / 8;
  bits += at.row * partials.width * 64 * box_row;
  Written full = fulls.of(at.row);
  Written partial = partials.of(at.row);
  for (int32_t i = 0; i < stages.total() << sizes.log2_boxes; i += kWarp) {
    KeptBox const box =
        kept_box(p, sizes, stages, at.group, i + static_cast<int32_t>(threadIdx.x % kWarp));
    bool const there = box.block >= 0;
    full.append(there && box.bits == nullptr, box.block);
    bool const has_bits = there && box.bits != nullptr;
    int32_t const place = partial.append(has_bits, box.block);
    for (uint32_t lanes = __ballot_sync(kAllLanes, has_bits); lanes != 0; lanes &= lanes - 1) {
      int const lane = __ffs(lanes) - 1;
      auto const address =
          __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(box.bits), lane);
      int64_t const to = __shfl_sync(kAllLanes, place, lane);
      copy_bits(reinterpret_cast<uint8_t const*>(address), p.block_kv / 8, bits + to * 64 * box_row,
                box_row);
    }
  }
  fulls.end(at.row, full);
  if (p.partial.counts != nullptr) {
    partials.end(at.row, partial);
  }
}

__global__ void __launch_bounds__(kRowThreads)
    keep_columns(Stripe::Params const p, BoxSizes const sizes, int32_t tile_k, KeptGroups at,
                 NewLists const columns, NewLists const runs) {
  if (!at.find()) {
    return;
  }
  auto const stages = group_stages(p, sizes, tile_k, at.batch, at.head, at.group, at.bits());
  auto const lane = static_cast<int32_t>(threadIdx.x % kWarp);
  Written column = columns.of(at.row);
  Written run = runs.of(at.row);
  for (int32_t i = 0; i < stages.total(); ++i) {
    if (!stages.keeps(i)) {
      continue;
    }
    StripeStream const& from = stages.stream(i);
    int32_t const index = stages.index(i);
    int32_t const of_columns = index - run_stages(sizes, from);
    if (of_columns < 0) {
      bool const box = lane < 1 << sizes.log2_boxes;
      int32_t const start = box ? run_origin(p, sizes, from, index, lane) : kAbsent;
      run.append(start < p.len_kv, start);
      continue;
    }
    for (int32_t w = 0; w < tile_k; w += kWarp) {
      int32_t const key = column_key(p, listed_column(from, of_columns * tile_k + w + lane));
      column.append(key < p.len_kv, key);
    }
  }
  columns.end(at.row, column);
  if (p.ranges.counts != nullptr) {
    runs.end(at.row, run);
  }
}

NewLists new_lists(int64_t rows, int32_t width, ExecutionContext const& context) {
  return {allocate<int32_t>(context, rows), allocate<int32_t>(context, rows * width), width};
}

BlockSparse::Lists lists_of(NewLists const& lists) {
  return {lists.counts, lists.indices, lists.width};
}

// Groups of 64 rows with lists of their own.
template <class Params>
void take_groups(Params& p, KeptGroups const& groups) {
  p.block_q = 64;
  p.head_stride = groups.groups;
  p.batch_stride = p.head_stride * groups.heads;
}

BlockSparse::Params keep(BlockSparse::Params const& p, FmhaProblem const& problem, int32_t tile_k,
                         KeptGroups const& groups, ExecutionContext const& context) {
  auto* const stream = static_cast<cudaStream_t>(context.stream);
  BoxSizes const sizes = box_sizes(p.block_kv, tile_k);
  ListPlan plan = {};
  if (p.block_q == 64) {  // the pairs of blocks are those of the forward pass
    ListSizes const of_lists = list_sizes(p, problem.batch, problem.heads_q);
    plan = plan_lists(p, of_lists, context.memory->allocate(list_plan_bytes(p, of_lists)), stream);
  }
  BlockSparse::Params kept = p;
  kept.block_kv = 1 << sizes.log2_box;
  take_groups(kept, groups);
  NewLists const full = new_lists(groups.rows, p.full.width << sizes.log2_split, context);
  kept.full = lists_of(full);
  NewLists partial = {};
  uint8_t* bits = nullptr;
  if (p.partial.counts != nullptr) {
    partial = new_lists(groups.rows, p.partial.width << sizes.log2_split, context);
    kept.partial = lists_of(partial);
    bits = allocate<uint8_t>(context, groups.rows * partial.width * BlockSparse::bits_bytes(kept));
    kept.bits = bits;
  }
  keep_blocks<<<row_blocks(groups.rows, "the groups of 64 query rows"), kRowThreads, 0, stream>>>(
      p, plan, sizes, groups, full, partial, bits);
  return kept;
}

Stripe::Params keep(Stripe::Params const& p, FmhaProblem const& /*problem*/, int32_t tile_k,
                    KeptGroups const& groups, ExecutionContext const& context) {
  BoxSizes const sizes = run_sizes(p, tile_k);
  Stripe::Params kept = p;
  kept.range_size = 1 << sizes.log2_box;
  take_groups(kept, groups);
  NewLists const columns = new_lists(groups.rows, p.columns.width, context);
  kept.columns = lists_of(columns);
  NewLists runs = {};
  if (p.ranges.counts != nullptr) {
    runs = new_lists(groups.rows, p.ranges.width << sizes.log2_split, context);
    kept.ranges = lists_of(runs);
  }
  keep_columns<<<row_blocks(groups.rows, "the groups of 64 query rows"), kRowThreads, 0,
                 static_cast<cudaStream_t>(context.stream)>>>(p, sizes, tile_k, groups, columns,
                                                              runs);
  return kept;
}

}  // namespace

void show_kept_lists(FmhaProblem& problem, int32_t tile_k, ExecutionContext const& context) {
  KeptGroups groups = {};
  groups.skipped = problem.skip_bits;
  groups.heads = problem.heads_q;
  groups.groups = skip_groups(problem);
  groups.rows = int64_t{problem.batch} * groups.heads * groups.groups;
  groups.words = skip_sizes(problem, tile_k, problem.head_dim).words;
  if (auto const* const blocks = std::get_if<BlockSparse::Params>(&problem.sparsity)) {
    problem.sparsity = keep(*blocks, problem, tile_k, groups, context);
  } else {
    problem.sparsity =
        keep(std::get<Stripe::Params>(problem.sparsity), problem, tile_k, groups, context);
  }
  check_cuda(cudaGetLastError(), "launching the listing of what was kept");
  problem.skip_threshold = nullptr;
}

}  // namespace sparse_fmha::device
