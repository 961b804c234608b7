// Which keys of which groups a thread block of a decode kernel has.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/decode/params.h"

namespace sparse_fmha::sm90 {

// Fills in the plan. Called by all threads of a block; `warp_units` is shared memory with a number
// for each warp.
__device__ __forceinline__ void plan_groups(DecodeParams const& params, DecodePlan const& plan,
                                            int32_t* warp_units) {
  int const lane = threadIdx.x % 32;
  int const warp = threadIdx.x / 32;
  int32_t const groups = params.groups / params.lines;
  int32_t before = 0;
  CUTE_NO_UNROLL
  for (int32_t base = 0; base < groups; base += blockDim.x) {
    int32_t const group = base + threadIdx.x;
    int32_t end = 0;
    if (group < groups) {
      auto const at = params.group(group, 0);
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
    if (group < groups) {
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

// The workers that share groups, and which of them this one is.
struct DecodeTeam {
  int32_t first_group;
  int32_t groups;  // of a line
  int32_t worker;
  int32_t workers;

  // The team of a worker of this block: its cluster's, or that of all blocks.
  __device__ __forceinline__ DecodeTeam(DecodeParams const& params, int worker_of_block,
                                        int workers_of_block) {
    bool const alone = params.cluster > 0;
    int32_t const blocks = alone ? params.cluster : static_cast<int32_t>(gridDim.x);
    int32_t const block = static_cast<int32_t>(blockIdx.x) % blocks;
    first_group = static_cast<int32_t>(blockIdx.x) / blocks;
    groups = alone ? 1 : params.groups / params.lines;
    worker = worker_of_block * blocks + block;
    workers = blocks * workers_of_block;
  }
};

// The plan of a team with one group, by one thread.
__device__ __forceinline__ void plan_one_group(DecodeParams const& params, int32_t group,
                                               DecodePlan const& plan) {
  auto const at = params.group(group, 0);
  KeyRange const tiles = decode_tiles(params.keys, at.batch, at.head, at.row_group);
  plan.tiles[0] = tiles;
  plan.first[0] = 0;
  plan.first[1] = tiles.end - tiles.begin;
}

// What a part has of a group.
struct DecodePiece {
  DecodeParams::Group at;
  int32_t line;
  int32_t group;  // of the line
  KeyRange tiles;
  int32_t part;       // of the line
  int32_t last_part;  // of the group
  bool begins;        // it has the group's first keys

  SPARSE_FMHA_HD bool alone() const { return begins && part == last_part; }
  // Among the parts, and groups, of all lines.
  SPARSE_FMHA_HD int32_t part_of_all(int32_t lines) const { return part * lines + line; }
  SPARSE_FMHA_HD int32_t group_of_all(int32_t lines) const { return group * lines + line; }
  SPARSE_FMHA_HD int64_t place(int32_t lines) const {
    return DecodeParts::place(part_of_all(lines), begins);
  }
};

// Calls body(piece) for the pieces of a part. The parts of lines alternate.
template <class Body>
__device__ __forceinline__ void for_each_piece(DecodeParams const& params, DecodePlan const& plan,
                                               DecodeTeam const& team, DecodeParts const& cut,
                                               int32_t part, Body body) {
  int32_t const unit_tiles = params.unit_tiles();
  int32_t const line = part % params.lines;
  int32_t const of_line = part / params.lines;
  int32_t unit = cut.begin(of_line);
  int32_t const end = cut.begin(of_line + 1);
  CUTE_NO_UNROLL
  for (int32_t group = decode_group_of(plan.first, team.groups, unit); unit < end; ++group) {
    int32_t const begins = plan.first[group];
    int32_t const next = plan.first[group + 1];
    int32_t const stop = min_int(next, end);
    if (unit < stop) {
      KeyRange const all = plan.tiles[group];
      body(DecodePiece{params.group(team.first_group + group, line),
                       line,
                       group,
                       {all.begin + (unit - begins) * unit_tiles,
                        min_int(all.begin + (stop - begins) * unit_tiles, all.end)},
                       of_line,
                       cut.part_of(next - 1),
                       unit == begins});
      unit = stop;
    }
  }
}

}  // namespace sparse_fmha::sm90
