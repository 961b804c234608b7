// Which keys of which groups a thread block of a decode kernel has.
#pragma once

#include "sparse_fmha/device/decode/params.h"

namespace sparse_fmha::device {

// Fills in the plan. Called by all threads of a block; `warp_units` is shared memory with a number
// for each warp.
__device__ __forceinline__ void plan_groups(DecodeParams const& params, DecodePlan const& plan,
                                            int32_t* warp_units) {
  int const lane = threadIdx.x % 32;
  int const warp = threadIdx.x / 32;
  int32_t before = 0;
  CUTE_NO_UNROLL
  for (int32_t base = 0; base < params.groups; base += blockDim.x) {
    int32_t const group = base + threadIdx.x;
    int32_t end = 0;
    if (group < params.groups) {
      auto const at = params.group(group);
      KeyRange const tiles = decode_tiles(params.keys, at.batch, at.head, at.row_group);
      plan.tiles[group] = tiles;
      end = ceil_div(tiles.end - tiles.begin, params.unit_tiles());
    }
    CUTE_NO_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      int32_t const left = __shfl_up_sync(0xffffffff, end, step);
      end += lane >= step ? left : 0;
    }
    if (lane == 31) {
      warp_units[warp] = end;
    }
    __syncthreads();
    int32_t total = 0;
    CUTE_NO_UNROLL
    for (int w = 0; w < blockDim.x / 32; ++w) {
      end += w < warp ? warp_units[w] : 0;
      total += warp_units[w];
    }
    if (group < params.groups) {
      plan.first[group + 1] = before + end;
    }
    before += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    plan.first[0] = 0;
  }
  __syncthreads();
}

// What a part has of a group.
struct DecodePiece {
  DecodeParams::Group at;
  int32_t group;
  KeyRange tiles;
  int32_t part;
  int32_t last_part;  // of the group
  bool begins;        // it has the group's first keys

  SPARSE_FMHA_HD bool alone() const { return begins && part == last_part; }
  SPARSE_FMHA_HD int64_t place() const { return DecodeParts::place(part, begins); }
};

// What a part has of a group with the units [begins, next): its units [unit, stop).
__device__ __forceinline__ DecodePiece piece_of(DecodeParams const& params, DecodePlan const& plan,
                                                DecodeParts const& cut, int32_t unit_tiles,
                                                int32_t part, int32_t group, int32_t begins,
                                                int32_t next, int32_t unit, int32_t stop) {
  KeyRange const all = plan.tiles[group];
  return DecodePiece{params.group(group),
                     group,
                     {all.begin + (unit - begins) * unit_tiles,
                      min_int(all.begin + (stop - begins) * unit_tiles, all.end)},
                     part,
                     cut.part_of(next - 1),
                     unit == begins};
}

// Calls body(piece) for the pieces of a part.
template <class Body>
__device__ __forceinline__ void for_each_piece(DecodeParams const& params, DecodePlan const& plan,
                                               DecodeParts const& cut, int32_t part, Body body) {
  int32_t const unit_tiles = params.unit_tiles();
  int32_t unit = cut.begin(part);
  int32_t const end = cut.begin(part + 1);
  CUTE_NO_UNROLL
  for (int32_t group = decode_group_of(plan.first, params.groups, unit); unit < end; ++group) {
    int32_t const begins = plan.first[group];
    int32_t const next = plan.first[group + 1];
    int32_t const stop = min_int(next, end);
    if (unit < stop) {
      body(piece_of(params, plan, cut, unit_tiles, part, group, begins, next, unit, stop));
      unit = stop;
    }
  }
}

}  // namespace sparse_fmha::device
