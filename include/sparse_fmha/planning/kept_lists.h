// What a group of 64 query rows kept of its lists of key blocks or keys, by the stages that it
// skipped. Integer arithmetic, shared by the kernels (device/kept_tiles.h) and the host.
//
// The unit is a box of a stage (BoxSizes) or a single column: a key block longer than a stage may
// be kept in parts.
#pragma once

#include "sparse_fmha/planning/stripe_stages.h"

namespace sparse_fmha {

// The stages of one group in the order of the forward pass: those of both groups of a query tile,
// then its own. skipped: the group's bits, of which the first is that of the last stage.
template <class Stream>
struct GroupStages {
  Stream both;
  Stream own;
  int32_t num_both;
  int32_t num_own;
  uint32_t const* skipped;

  SPARSE_FMHA_HD int32_t total() const { return num_both + num_own; }
  SPARSE_FMHA_HD Stream const& stream(int32_t i) const { return i < num_both ? both : own; }
  SPARSE_FMHA_HD int32_t index(int32_t i) const { return i < num_both ? i : i - num_both; }
  SPARSE_FMHA_HD bool keeps(int32_t i) const {
    int32_t const bit = total() - 1 - i;
    return (skipped[bit / 32] >> bit % 32 & 1) == 0;
  }
};

template <class Stream>
SPARSE_FMHA_HD GroupStages<Stream> group_stages(Stream const (&streams)[3],
                                                StreamStages const& stages, int32_t group,
                                                uint32_t const* skipped) {
  bool const first = group % 2 == 0;
  return {streams[0], first ? streams[1] : streams[2], stages.both,
          first ? stages.first : stages.second, skipped};
}

// The stages of a group of block lists. plan: of the pairs of blocks of 64 rows.
SPARSE_FMHA_HD GroupStages<ListStream> group_stages(BlockSparse::Params const& p,
                                                    ListPlan const& plan, BoxSizes const& sizes,
                                                    int32_t batch, int32_t head, int32_t group,
                                                    uint32_t const* skipped) {
  ListStream streams[3];
  find_streams(p, plan, batch, head, group / 2, streams);
  return group_stages(streams, count_stages(sizes, streams), group, skipped);
}
// And of stripes.
SPARSE_FMHA_HD GroupStages<StripeStream> group_stages(Stripe::Params const& p,
                                                      BoxSizes const& sizes, int32_t tile_k,
                                                      int32_t batch, int32_t head, int32_t group,
                                                      uint32_t const* skipped) {
  StripeStream streams[3];
  find_streams(p, batch, head, group / 2, streams);
  auto stages = [&](int32_t i) { return stages_of(sizes, tile_k, streams[i]); };
  return group_stages(streams, {stages(0), stages(1), stages(2)}, group, skipped);
}

// A box that a group kept, or none.
struct KeptBox {
  int32_t block;        // in boxes from the first key; negative: none
  uint8_t const* bits;  // of the group's first row and the box's first key; nullptr: no bitmask
};

// The i-th box of the group's walk, for any i.
SPARSE_FMHA_HD KeptBox kept_box(BlockSparse::Params const& p, BoxSizes const& sizes,
                                GroupStages<ListStream> const& stages, int32_t group, int32_t i) {
  int32_t const stage = i >> sizes.log2_boxes;
  if (stage >= stages.total() || !stages.keeps(stage)) {
    return {-1, nullptr};
  }
  ListStream const& from = stages.stream(stage);
  ListBox const box = list_box(sizes, from, stages.index(stage), i & ((1 << sizes.log2_boxes) - 1));
  int32_t const origin = box_origin(p, sizes, box);
  if (origin >= p.len_kv) {
    return {-1, nullptr};
  }
  uint8_t const* bits = nullptr;
  if (box.entry < from.partials) {
    int32_t const first_row = group * 64 % p.block_q;
    bits = from.bits + int64_t{box.entry} * BlockSparse::bits_bytes(p) +
           first_row * (p.block_kv / 8) + (box.part << sizes.log2_box) / 8;
  }
  return {origin >> sizes.log2_box, bits};
}

}  // namespace sparse_fmha
