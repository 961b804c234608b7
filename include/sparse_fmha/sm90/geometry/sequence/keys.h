// Geometry of the dK/dV kernel on one axis of tokens.
//
// A geometry of that kernel has:
//   Work, prepare(Work, WorkTile, RingState)   a key tile of a head, prepared by one thread
//   walk(Work)                                 the query tiles that see it, partial ones first
//   Order                                      in which they are visited
//   steps(Work): count, next(i)                the same for each query head of the group
//   source(Work, step)                         where a query tile lies
//   query_tile(Work, step)                     its index, for kernels that add dQ up
//   load_keys, load_q, load_dout, load_terms   copies
//   key_index(Work, row)                       the number, in its head, of a key of the tile;
//                                              negative if there is none
//   mask_place(walk, i, RingState)             where the mask of a partial tile is looked up
//   Mask(geometry, Work, part): look_up(place), sees(seen, i)   scores are keys by queries
//   kMaskWarp                                  whether a warp computes masks:
//   begin_masks(Work), publish_mask(Work, step, RingState)
//   kByStage                                   whether each stage tells a consumer how to use it,
//                                              by tiles_loaded(Work), use(part, RingState) and
//                                              head(RingState), in the group, instead of walk(Work)
//   store_dk, store_dv                         64 keys each, clipped to the tensor
#pragma once

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/sm90/backward/dkv/order.h"
#include "sparse_fmha/sm90/backward/dkv/storage.h"
#include "sparse_fmha/sm90/geometry/sequence/key_copies.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
struct SequenceKeys {
  using Element = typename Traits::Element;

  using Params = KeyCopies<Traits>;
  struct Shared {};
  struct Work {
    WorkTile tile;  // q_tile: index of the key tile
  };
  static constexpr bool kMaskWarp = false;
  static constexpr bool kByStage = false;
  // All walks end at the last queries. Where dQ is added up, they begin there: blocks that begin at
  // the same time then meet the same rows of queries and sums, and the L2 cache has them.
  using Order = std::conditional_t<Traits::kAddsDq, Descending, Ascending>;
  using Source = QuerySource;
  struct Step {
    int32_t token;
    int32_t head;  // in the group
  };

  static void launch(FmhaProblem const& p, ExecutionContext const& context);  // in launch.h

  DkvParams<SequenceKeys, Mechanism> const& params;
  Shared& shared;

  __device__ __forceinline__ void init() const {}
  __device__ __forceinline__ void prepare(Work& work, WorkTile const& tile,
                                          RingState<1> const& /*state*/) const {
    work.tile = tile;
    // The scheduler starts with the last tile. The first keys are seen by most queries.
    work.tile.q_tile = params.scheduler.q_tiles - 1 - tile.q_tile;
  }

  __device__ __forceinline__ auto walk(Work const& work) const {
    return Mechanism::walk_transposed(params.sparsity, Traits::tile_shape(),
                                      {{0, 0, 0}, {0, 0, first_key(work)}});
  }
  struct Steps {
    decltype(Mechanism::walk_transposed({}, {}, {})) walk;
    int tiles;  // per head
    int count;
    int tile = Order::first(tiles);
    int head = 0;
    __device__ __forceinline__ Step next(int /*i*/) {
      Step const step{walk.tile(tile)[2], head};
      tile = Order::next(tile, tiles);
      head += tile == Order::first(tiles) ? 1 : 0;
      return step;
    }
  };
  __device__ __forceinline__ Steps steps(Work const& work) const {
    auto const own = walk(work);
    int const tiles = own.num_partial + own.num_full;
    return {own, tiles, tiles * params.heads_per_kv};
  }
  __device__ __forceinline__ Source source(Work const& work, Step const& step) const {
    return {step.token, work.tile.head * params.heads_per_kv + step.head, work.tile.batch};
  }

  // The index of a query tile among those of all heads.
  __device__ __forceinline__ int32_t query_tile(Work const& work, Step const& step) const {
    Source const from = source(work, step);
    return params.dq.first_tile(from.batch, from.head) + from.token / Traits::kTileQ;
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
    int32_t const token = first_key(work) + row;
    return token < params.sparsity.len_kv ? token : -1;
  }

  template <class Walk>
  __device__ __forceinline__ Coord mask_place(Walk const& walk, int i,
                                              RingState<Traits::kStages> const& /*place*/) const {
    return walk.tile(i);
  }
  class Mask {
   public:
    __device__ __forceinline__ Mask(SequenceKeys const& geometry, Work const& work, int part)
        : geometry_(geometry),
          key_(geometry.first_key(work) + part * 64 + AccumulatorPosition().row) {}
    // The first column that sees the thread's first key. Its other key adds a constant: where
    // first_query is clamped to 0, any column sees both. If all queries see all keys, how many keys
    // beyond the last one it is: keys out of range read as zero, their weights may overflow, and a
    // kernel that adds dQ up would meet them.
    struct Seen {
      int32_t first;
    };
    __device__ __forceinline__ Seen look_up(Coord const& tile) const {
      auto const& p = geometry_.params.sparsity;
      if constexpr (kStep == 0) {
        return {key_ - (p.len_kv - 1)};
      }
      int32_t const from_end = Mechanism::first_query(p, p.len_kv) - (p.len_kv - key_) * kStep;
      return {from_end - tile[2] - AccumulatorPosition().column};
    }
    static __device__ __forceinline__ bool sees(Seen const& seen, int i) {
      return AccumulatorPosition::column_of(i) * kStep - 8 * AccumulatorPosition::row_of(i) >=
             seen.first;
    }

   private:
    static constexpr int32_t kStep = Mechanism::kStep;
    SequenceKeys const& geometry_;
    int32_t const key_;
  };

  __device__ __forceinline__ void store_dk(Element const* from, Work const& work, int part) const {
    Params::store(params.geometry.dk, from, work.tile, part);
  }
  __device__ __forceinline__ void store_dv(Element const* from, Work const& work, int part) const {
    Params::store(params.geometry.dv, from, work.tile, part);
  }

 private:
  __device__ __forceinline__ int first_key(Work const& work) const {
    return Params::first_key(work.tile);
  }
};

}  // namespace sparse_fmha::sm90
