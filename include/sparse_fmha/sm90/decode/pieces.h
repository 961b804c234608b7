// Which keys of which groups a thread block of a decode kernel has.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/decode/params.h"

namespace sparse_fmha::sm90 {

// Named barriers of a decode block; those of its consumers follow.
inline constexpr int kPlanningBarrier = 0;
inline constexpr int kPlannedBarrier = 1;
inline constexpr int kConsumerBarrier = 2;

// Fills in the plan. Called by the first or last kThreads threads of a block, `thread` of them;
// `warp_units` is shared memory with a number for each of their warps.
template <int kThreads>
__device__ __forceinline__ void plan_groups(DecodeParams const& params, DecodePlan const& plan,
                                            int32_t* warp_units, int thread) {
  auto const sync = [] { cutlass::arch::NamedBarrier::sync(kThreads, kPlanningBarrier); };
  int const lane = thread % 32;
  int const warp = thread / 32;
  int32_t const groups = params.groups / params.lines;
  int32_t before = 0;
  CUTE_NO_UNROLL
  for (int32_t base = 0; base < groups; base += kThreads) {
    int32_t const group = base + thread;
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
    sync();
    int32_t total = 0;
    CUTE_NO_UNROLL
    for (int w = 0; w < kThreads / 32; ++w) {
      end += w < warp ? warp_units[w] : 0;
      total += warp_units[w];
    }
    if (group < groups) {
      plan.first[group + 1] = before + end;
    }
    before += total;
    sync();
  }
  if (thread == 0) {
    plan.first[0] = 0;
  }
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

// The pieces of one part after another. The parts of lines alternate.
class PieceWalk {
 public:
  __device__ __forceinline__ PieceWalk(DecodeParams const& params, DecodeTeam const& team)
      : params_(params), team_(team) {}

  __device__ __forceinline__ void begin(DecodePlan const& plan, DecodeParts const& cut,
                                        int32_t part) {
    line_ = part % params_.lines;
    part_ = part / params_.lines;
    unit_ = cut.begin(part_);
    end_ = cut.begin(part_ + 1);
    group_ = decode_group_of(plan.first, team_.groups, unit_);
  }
  // Returns whether the part has one more piece.
  __device__ __forceinline__ bool next(DecodePlan const& plan, DecodeParts const& cut,
                                       DecodePiece& piece) {
    int32_t const unit_tiles = params_.unit_tiles();
    CUTE_NO_UNROLL
    while (unit_ < end_) {
      int32_t const group = group_++;
      int32_t const begins = plan.first[group];
      int32_t const next = plan.first[group + 1];
      int32_t const stop = min_int(next, end_);
      if (unit_ < stop) {
        KeyRange const all = plan.tiles[group];
        piece = DecodePiece{params_.group(team_.first_group + group, line_),
                            line_,
                            group,
                            {all.begin + (unit_ - begins) * unit_tiles,
                             min_int(all.begin + (stop - begins) * unit_tiles, all.end)},
                            part_,
                            cut.part_of(next - 1),
                            unit_ == begins};
        unit_ = stop;
        return true;
      }
    }
    return false;
  }
  // A piece without keys, before there is a plan.
  __device__ __forceinline__ DecodePiece none() const {
    int32_t nothing = 0;
    asm volatile("" : "+r"(nothing));  // the compiler must not see that there is nothing to do
    return {params_.group(team_.first_group, 0), 0, 0, {nothing, nothing}, nothing - 1, -1, false};
  }

 private:
  DecodeParams const& params_;
  DecodeTeam const& team_;
  int32_t line_ = 0;
  int32_t part_ = 0;
  int32_t unit_ = 0;
  int32_t end_ = 0;
  int32_t group_ = 0;
};

}  // namespace sparse_fmha::sm90
