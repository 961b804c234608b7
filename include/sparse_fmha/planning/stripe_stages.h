// The contents of the stages of a query tile with lists of single keys and runs. Integer
// arithmetic, shared by the kernel and the host tests.
#pragma once

#include "sparse_fmha/mechanisms/stripe.h"
#include "sparse_fmha/planning/list_stages.h"

namespace sparse_fmha {

// How runs of keys fill stages; sizes are powers of two. A run longer than a stage is split into
// several boxes.
inline BoxSizes run_sizes(Stripe::Params const& p, int32_t tile_k) {
  return box_sizes(p.range_size, tile_k);
}

// The stages of one stream: runs first, then columns.
struct StripeStream {
  int32_t const* runs;  // first key of each run
  int32_t const* columns;
  int32_t num_runs;
  int32_t num_columns;
};

SPARSE_FMHA_HD StripeStream stripe_stream(Stripe::Params const& p, int64_t group) {
  return {p.ranges.counts == nullptr ? nullptr : p.ranges.indices + group * p.ranges.width,
          p.columns.indices + group * p.columns.width, BlockSparse::count(p.ranges, group),
          BlockSparse::count(p.columns, group)};
}

// The streams of a query tile of 128 rows: one for both consumers if they are in the same group,
// else one for each.
SPARSE_FMHA_HD void find_streams(Stripe::Params const& p, int32_t batch, int32_t head,
                                 int32_t q_tile, StripeStream (&streams)[3]) {
  int64_t const lists = batch * p.batch_stride + head * p.head_stride;
  int32_t const first = q_tile * 128;
  bool const shared = first + 64 >= p.len_q || first / p.block_q == (first + 64) / p.block_q;
  StripeStream const none = {nullptr, nullptr, 0, 0};
  StripeStream const of_first = stripe_stream(p, lists + first / p.block_q);
  streams[0] = shared ? of_first : none;
  streams[1] = shared ? none : of_first;
  streams[2] = shared ? none : stripe_stream(p, lists + (first + 64) / p.block_q);
}

SPARSE_FMHA_HD int32_t run_stages(BoxSizes const& sizes, StripeStream const& stream) {
  int32_t const boxes = stream.num_runs << sizes.log2_split;
  return (boxes + (1 << sizes.log2_boxes) - 1) >> sizes.log2_boxes;
}
SPARSE_FMHA_HD int32_t stages_of(BoxSizes const& sizes, int32_t tile_k,
                                 StripeStream const& stream) {
  return run_stages(sizes, stream) + ceil_div(stream.num_columns, tile_k);
}

// Whether all rows, each of which sees keys up to at least `limit`, see all of a run or a column.
SPARSE_FMHA_HD bool is_whole_run(Stripe::Params const& p, int32_t start, int32_t limit) {
  return start >= 0 && start <= limit - p.range_size;
}
SPARSE_FMHA_HD bool is_whole_column(int32_t key, int32_t limit) { return key >= 0 && key < limit; }

// `runs`, `columns`: the number of leading ones that all rows see entirely.
SPARSE_FMHA_HD WholeStages whole_stages(BoxSizes const& sizes, int32_t tile_k,
                                        StripeStream const& stream, int32_t runs, int32_t columns) {
  int32_t const stages = run_stages(sizes, stream);
  bool const masks_runs =
      runs < stream.num_runs || stages << sizes.log2_boxes != stream.num_runs << sizes.log2_split;
  return {masks_runs ? stages : 0, stages + columns / tile_k};
}

// First key of a box of runs; kAbsent if there is none.
SPARSE_FMHA_HD int32_t run_origin(Stripe::Params const& p, BoxSizes const& sizes,
                                  StripeStream const& stream, int32_t stage, int32_t box) {
  int32_t const i = (stage << sizes.log2_boxes) + box;
  int32_t const run = i >> sizes.log2_split;
  if (run >= stream.num_runs) {
    return kAbsent;
  }
  int32_t const start = stream.runs[run];
  bool const there = start >= 0 && start < p.len_kv;
  int32_t const part = i & ((1 << sizes.log2_split) - 1);
  return there ? start + (part << sizes.log2_box) : kAbsent;
}

// The i-th entry of the column list, as stored; kAbsent past the end. It is interpreted later
// (column_key), so that nothing here waits for the memory.
SPARSE_FMHA_HD int32_t listed_column(StripeStream const& stream, int32_t i) {
  int32_t listed = kAbsent;
  if (i < stream.num_columns) {
    listed = stream.columns[i];
  }
  return listed;
}
// The listed key; kAbsent if there is none.
SPARSE_FMHA_HD int32_t column_key(Stripe::Params const& p, int32_t listed) {
  return listed >= 0 && listed < p.len_kv ? listed : kAbsent;
}

}  // namespace sparse_fmha
