// Geometry of the dK/dV kernel for mechanisms with lists of keys.
//
// Lists are transposed on the device beforehand (device/transposed_lists.h): for each part of 64
// keys, a bitmap says which steps of 64 query rows see it. A key tile has one or two parts. A step
// that any part needs is loaded; a consumer passes over steps that its part does not need. A warp
// computes the masks: it finds which keys each query sees, and transposes the bits. Columns of
// stripes stay among keys that no row lists: this is exact, and takes the time of all pairs where
// columns are scattered. Names are those of geometry/sequence/keys.h.
#pragma once

#include <type_traits>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/planning/transposed_lists.h"
#include "sparse_fmha/sm90/backward/dkv/storage.h"
#include "sparse_fmha/sm90/geometry/sequence/key_copies.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
struct ListKeys {
  using Element = typename Traits::Element;
  using Source = QuerySource;
  static constexpr int kParts = Traits::kTileK / kPartKeys;
  static constexpr int kMaskSlots = 2 * Traits::kStages;  // one is written while others are in use
  static_assert(Traits::kTileQ == kStepRows, "steps are those of the transposed lists");
  static_assert(kParts == 1 || kParts == 2, "the steps of at most two parts are looked through");

  static constexpr bool kMaskWarp = true;
  static constexpr bool kByStage = true;

  struct Params : KeyCopies<Traits> {
    TransposedLists lists;
  };
  struct Work {
    WorkTile tile;  // q_tile: index of the key tile
    int32_t steps;  // over all heads of the group
  };
  // Mask of a stage: how each part uses the queries and, for each key, 16 bits for each of the four
  // threads that hold its columns.
  struct StageMask {
    PartUse uses[kParts];
    int32_t head;  // in the group
    alignas(8) uint16_t bits[Traits::kTileK][4];
  };
  struct Shared {
    StageMask masks[kMaskSlots];
  };
  struct Step {
    int32_t number;  // of the query rows
    int32_t head;    // in the group
    PartUse uses[kParts];
  };

  static void launch(FmhaProblem const& p, ExecutionContext const& context);  // in launch_keys.h

  DkvParams<ListKeys, Mechanism> const& params;
  Shared& shared;

  __device__ __forceinline__ void init() const {}
  __device__ __forceinline__ void prepare(Work& work, WorkTile const& tile,
                                          RingState<1> const& /*state*/) const {
    work.tile = tile;
    if (tile.batch < 0) {
      return;
    }
    auto const& lists = params.geometry.lists;
    int64_t const list = tile.batch * lists.batch_stride_kv + tile.head * lists.head_stride;
    // The scheduler counts down.
    int64_t const first = list * lists.key_tiles;
    work.tile.q_tile = lists.order[first + lists.key_tiles - 1 - tile.q_tile];
    work.steps = lists.counts[3 * (first + work.tile.q_tile)];
  }
  __device__ __forceinline__ int tiles_loaded(Work const& work) const { return work.steps; }

  // The steps of a key tile for each head of the group, in ascending order. Each lane holds one
  // word of the bitmaps.
  class Steps {
   public:
    int const count;
    __device__ __forceinline__ Steps(ListKeys const& geometry, Work const& work)
        : count(work.steps), geometry_(geometry), tile_(work.tile) {}

    __device__ __forceinline__ Step next(int /*i*/) {
      uint32_t lanes = __ballot_sync(0xffffffff, left_ != 0);
      while (lanes == 0) {
        fetch();
        lanes = __ballot_sync(0xffffffff, left_ != 0);
      }
      int const source = lowest_bit(lanes);
      int const bit = lowest_bit(__shfl_sync(0xffffffff, left_, source));
      if (static_cast<int>(threadIdx.x % 32) == source) {
        left_ &= left_ - 1;
      }
      Step step = {(first_word_ + source) * 32 + bit, head_, {}};
      CUTE_UNROLL
      for (int part = 0; part < kParts; ++part) {
        step.uses[part] = {(__shfl_sync(0xffffffff, seen_[part], source) >> bit & 1) != 0,
                           (__shfl_sync(0xffffffff, masked_[part], source) >> bit & 1) != 0};
      }
      return step;
    }

   private:
    __device__ __forceinline__ void fetch() {
      auto const& lists = geometry_.params.geometry.lists;
      first_word_ += 32;
      if (first_word_ >= lists.step_words) {
        first_word_ = 0;
        ++head_;
      }
      int const word = first_word_ + static_cast<int>(threadIdx.x % 32);
      int64_t const row =
          geometry_.list_of(tile_, head_) * lists.parts + int64_t{tile_.q_tile} * kParts;
      left_ = 0;
      CUTE_UNROLL
      for (int part = 0; part < kParts; ++part) {
        int64_t const at = (row + part) * lists.step_words + word;
        seen_[part] = word < lists.step_words ? lists.seen[at] : 0;
        masked_[part] = word < lists.step_words ? lists.masked[at] : 0;
        left_ |= seen_[part];
      }
    }
    ListKeys const& geometry_;
    WorkTile const tile_;
    int head_ = -1;
    int first_word_ = 1 << 30;  // so that the first fetch moves on to the first head
    uint32_t left_ = 0;
    uint32_t seen_[kParts];
    uint32_t masked_[kParts];
  };
  __device__ __forceinline__ Steps steps(Work const& work) const { return {*this, work}; }
  __device__ __forceinline__ Source source(Work const& work, Step const& step) const {
    return {step.number * kStepRows, head_of(work.tile, step.head), work.tile.batch};
  }
  __device__ __forceinline__ int32_t query_tile(Work const& work, Step const& step) const {
    return params.dq.first_tile(work.tile.batch, head_of(work.tile, step.head)) + step.number;
  }

  __device__ __forceinline__ void load_keys(FullBarrier& barrier, Element* k, Element* v,
                                            Work const& work) const {
    params.geometry.load_keys(barrier, k, v, work.tile);
  }
  __device__ __forceinline__ void load_q(FullBarrier& barrier, Element* to,
                                         Source const& from) const {
    params.geometry.load_q(barrier, to, from);
  }
  __device__ __forceinline__ void load_dout(FullBarrier& barrier, Element* to,
                                            Source const& from) const {
    params.geometry.load_dout(barrier, to, from);
  }
  __device__ __forceinline__ void load_terms(FullBarrier& barrier, RowTerms* to,
                                             Source const& from) const {
    params.geometry.load_terms(barrier, to, from);
  }

  __device__ __forceinline__ int64_t key_index(Work const& work, int row) const {
    int32_t const token = KeyCopies<Traits>::first_key(work.tile) + row;
    return token < params.sparsity.len_kv ? token : -1;
  }

  // Called by the whole mask warp.
  __device__ __forceinline__ void begin_masks(Work const& /*work*/) const {}
  __device__ __forceinline__ void publish_mask(Work const& work, Step const& step,
                                               RingState<Traits::kStages> const& place) const {
    auto const& p = params.sparsity;
    auto const& lists = params.geometry.lists;
    StageMask& mask = shared.masks[slot(place)];
    bool const has_thresholds = params.bias.from.rows.data != nullptr;
    bool masked = false;
    CUTE_UNROLL
    for (int part = 0; part < kParts; ++part) {
      PartUse use = step.uses[part];
      use.masked |= use.seen && has_thresholds;
      masked = masked || use.masked;
      if (threadIdx.x % 32 == 0) {
        mask.uses[part] = use;
      }
    }
    if (threadIdx.x % 32 == 0) {
      mask.head = step.head;
    }
    if (!masked) {
      return;
    }
    int32_t const first_query = step.number * kStepRows;
    int64_t const row = list_of(work.tile, step.head) * row_count(p) + row_of(p, first_query);
    int32_t const lane = static_cast<int32_t>(threadIdx.x % 32);
    int32_t const first_key = work.tile.q_tile * Traits::kTileK;
    auto show = [&](int32_t i, uint2 const& seen) {
      *reinterpret_cast<uint2*>(mask.bits[32 * i + lane]) = seen;
    };
    auto to_all = [](bool seen) { return seen ? uint2{0xffffffff, 0xffffffff} : uint2{0, 0}; };
    // Stripes have few words to look through, and no registers for another way.
    if constexpr (std::is_same_v<Mechanism, BlockSparse>) {
      if (!has_thresholds && have_one_limit(p, first_query, first_key + Traits::kTileK) &&
          !has_bitmask(p, lists, row, first_key, Traits::kTileK)) {
        int32_t const limit = BlockSparse::limit(p, first_query);
        CUTE_UNROLL
        for (int i = 0; i < Traits::kTileK / 32; ++i) {
          int32_t const key = first_key + 32 * i + lane;
          show(i, to_all(lists_key(p, lists, row, key) && key < limit));
        }
        return;
      }
    }
    int32_t const mine = lane < tile_entries(p, Traits::kTileK)
                             ? tile_entry(p, lists, row, first_key, lane)
                             : kNoBlock;
    auto entry = [&](int32_t i) { return __shfl_sync(0xffffffff, mine, i); };
    uint32_t halves[Traits::kTileK / 32][2];
    CUTE_UNROLL
    for (int i = 0; i < Traits::kTileK / 32; ++i) {
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        halves[i][half] = seen_keys(p, lists, row, entry, first_key, 32 * i,
                                    first_query + query_of_lane(half, lane));
      }
    }
    if (has_thresholds) {
      hide_below(work.tile, step, halves);
    }
    CUTE_UNROLL
    for (int i = 0; i < Traits::kTileK / 32; ++i) {
      uint2 seen = {halves[i][0], halves[i][1]};
      uint32_t const common = __shfl_sync(0xffffffff, seen.x, 0);
      if (__all_sync(0xffffffff, seen.x == common && seen.y == common)) {
        seen = to_all((common >> lane & 1) != 0);
      } else {
        transpose(seen.x);
        transpose(seen.y);
      }
      show(i, seen);
    }
  }

  __device__ __forceinline__ PartUse use(int part, RingState<Traits::kStages> const& place) const {
    compiler_fence();
    return shared.masks[slot(place)].uses[part];
  }
  __device__ __forceinline__ int32_t head(RingState<Traits::kStages> const& place) const {
    return shared.masks[slot(place)].head;
  }
  struct NoWalk {};
  __device__ __forceinline__ NoWalk walk(Work const& /*work*/) const { return {}; }
  __device__ __forceinline__ int mask_place(NoWalk const& /*walk*/, int /*i*/,
                                            RingState<Traits::kStages> const& place) const {
    return slot(place);
  }
  class Mask {
   public:
    __device__ __forceinline__ Mask(ListKeys const& geometry, Work const& /*work*/, int part)
        : masks_(geometry.shared.masks), part_(part) {}
    // Bits of the thread's columns that see each of its two keys.
    using Seen = uint32_t;
    __device__ __forceinline__ Seen look_up(int slot) const {
      compiler_fence();
      int const key = part_ * kPartKeys + AccumulatorPosition().row;
      auto const& bits = masks_[slot].bits;
      Seen const seen = bits[key][threadIdx.x % 4] | uint32_t{bits[key + 8][threadIdx.x % 4]} << 16;
      __syncwarp();  // one lane releases the stage for all
      return seen;
    }
    static __device__ __forceinline__ bool sees(Seen seen, int i) {
      return seen >> (AccumulatorPosition::row_of(i) * 16 + i / 4 * 2 + i % 2) & 1;
    }

   private:
    StageMask const* const masks_;
    int const part_;
  };

  __device__ __forceinline__ void store_dk(Element const* from, Work const& work, int part) const {
    KeyCopies<Traits>::store(params.geometry.dk, from, work.tile, part);
  }
  __device__ __forceinline__ void store_dv(Element const* from, Work const& work, int part) const {
    KeyCopies<Traits>::store(params.geometry.dv, from, work.tile, part);
  }

 private:
  // Hides keys whose bias is below the threshold of the lane's query in each half.
  __device__ __forceinline__ void hide_below(WorkTile const& tile, Step const& step,
                                             uint32_t (&halves)[Traits::kTileK / 32][2]) const {
    auto const& p = params.sparsity;
    int32_t const lane = static_cast<int32_t>(threadIdx.x % 32);
    int64_t const head = head_of(tile, step.head);
    auto number = [&](TokenNumbers const& of, int32_t token, int32_t tokens) {
      float const* const data = of.data + tile.batch * of.batch_stride + head * of.head_stride;
      return token < tokens ? __ldg(data + token) : 0.f;
    };
    float thresholds[2];
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      thresholds[half] = number(params.bias.from.rows,
                                step.number * kStepRows + query_of_lane(half, lane), p.len_q);
    }
    CUTE_UNROLL
    for (int i = 0; i < Traits::kTileK / 32; ++i) {
      float const mine =
          number(params.bias.from.keys, tile.q_tile * Traits::kTileK + 32 * i + lane, p.len_kv);
      uint32_t above[2] = {0, 0};
      CUTE_NO_UNROLL
      for (int key = 0; key < 32; ++key) {
        float const bias = __shfl_sync(0xffffffff, mine, key);
        above[0] |= uint32_t{bias >= thresholds[0]} << key;
        above[1] |= uint32_t{bias >= thresholds[1]} << key;
      }
      halves[i][0] &= above[0];
      halves[i][1] &= above[1];
    }
  }

  static __device__ __forceinline__ int slot(RingState<Traits::kStages> const& place) {
    return place.index + static_cast<int>(place.phase) * Traits::kStages;
  }
  // Bit j of lane i becomes bit i of lane j.
  static __device__ __forceinline__ void transpose(uint32_t& bits) {
    CUTE_UNROLL
    for (int distance = 16; distance > 0; distance /= 2) {
      bits = exchange(bits, __shfl_xor_sync(0xffffffff, bits, distance),
                      static_cast<int32_t>(threadIdx.x % 32), distance);
    }
  }
  __device__ __forceinline__ int32_t head_of(WorkTile const& tile, int32_t head) const {
    return tile.head * params.heads_per_kv + head;
  }
  __device__ __forceinline__ int64_t list_of(WorkTile const& tile, int32_t head) const {
    auto const& lists = params.geometry.lists;
    return tile.batch * int64_t{lists.batch_stride} + head_of(tile, head) * lists.head_stride;
  }
};

}  // namespace sparse_fmha::sm90
