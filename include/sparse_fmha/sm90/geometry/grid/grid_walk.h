// The walk of a query tile on a grid, for the producer.
#pragma once

#include "sparse_fmha/mechanisms/contract.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// A key tile: a box at a position of the grid, or a range of extra tokens that starts at origin[2].
struct KeyBox {
  Coord origin;
  int32_t extra;
  int32_t needed;  // bit w: by consumer w
};

// Where a box lies: its tensor map and its coordinates after the head.
struct BoxSource {
  int32_t map;  // negative: the extra tokens
  int32_t head;
  int32_t place[3];
};

// The ragged tile of extra tokens, the boxes of the mechanism's walk, then the other extra tokens.
template <class Traits, class Mechanism>
struct GridWalk {
  int32_t num_partial;
  int32_t num_full;
  int32_t ragged;  // 0 or 1
  int32_t extra_len;
  decltype(Mechanism::walk({}, {}, {})) boxes;
  Interval parts[Traits::kConsumers][kGridAxes];  // union of what the rows of a consumer see
  __device__ __forceinline__ KeyBox tile(int32_t i) const {
    constexpr int32_t kAll = (1 << Traits::kConsumers) - 1;
    int32_t const visited = boxes.num_partial + boxes.num_full;
    if (i < ragged) {
      return {{0, 0, extra_len / Traits::kTileK * Traits::kTileK}, 1, kAll};
    }
    if (i - ragged < visited) {
      KeyBox box{boxes.tile(i - ragged), 0, kAll};
      for (int w = 0; w < Traits::kConsumers; ++w) {
        for (int axis = 0; axis < kGridAxes; ++axis) {
          bool const apart = box.origin[axis] >= parts[w][axis].end ||
                             box.origin[axis] + boxes.step[axis] <= parts[w][axis].begin;
          box.needed &= ~(apart << w);
        }
      }
      return box;
    }
    return {{0, 0, (i - ragged - visited) * Traits::kTileK}, 1, kAll};
  }
};

}  // namespace sparse_fmha::sm90
