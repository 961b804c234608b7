// Keys of a sequence and the queries that see them, for the dK/dV kernel.
//
// A geometry of that kernel has
//   Work, prepare(Work, WorkTile, RingState)   a key tile of a head, found by one thread
//   walk(Work)                                 the query tiles that see it, partial ones first
//   steps(Work): count, next(i)                the same for each query head of the group
//   source(Work, step)                         where a query tile lies
//   load_keys, load_q, load_dout, load_terms   its copies
//   mask_place(walk, i, RingState)             where the mask of a partial tile is looked up
//   Mask(geometry, Work, part): look_up(place), sees(seen, i)   of scores, keys by queries
//   kMaskWarp, publish_masks                   whether, and how, a warp works masks out
//   store_dk, store_dv                         64 keys each, clipped to the tensor
#pragma once

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/sm90/backward/dkv/storage.h"
#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
struct SequenceKeys {
  using Element = typename Traits::Element;

  struct Params {
    CUtensorMap k;      // (D, Lkv, Hkv, B)
    CUtensorMap v;      // (D, Lkv, Hkv, B)
    CUtensorMap q;      // (D, Lq, Hq, B)
    CUtensorMap dout;   // (D, Lq, Hq, B)
    CUtensorMap terms;  // (4, Lq, Hq, B)
    CUtensorMap dk;     // (D, Lkv, Hkv, B)
    CUtensorMap dv;     // (D, Lkv, Hkv, B)
  };
  struct Shared {};
  struct Work {
    WorkTile tile;  // q_tile: number of the key tile
  };
  static constexpr bool kMaskWarp = false;
  struct Source {
    int32_t token;
    int32_t head;
    int32_t batch;
  };
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
    // The scheduler begins at the last tile, and the first keys are seen by most queries.
    work.tile.q_tile = params.scheduler.q_tiles - 1 - tile.q_tile;
  }

  __device__ __forceinline__ auto walk(Work const& work) const {
    return Mechanism::walk_transposed(params.sparsity, Traits::tile_shape(),
                                      {{0, 0, 0}, {0, 0, first_key(work)}});
  }
  struct Steps {
    decltype(Mechanism::walk_transposed({}, {}, {})) walk;
    int count;
    int tile = 0;
    int head = 0;
    __device__ __forceinline__ Step next(int /*i*/) {
      Step const step{walk.tile(tile)[2], head};
      if (++tile == walk.num_partial + walk.num_full) {
        tile = 0;
        ++head;
      }
      return step;
    }
  };
  __device__ __forceinline__ Steps steps(Work const& work) const {
    auto const tiles = walk(work);
    return {tiles, (tiles.num_partial + tiles.num_full) * params.heads_per_kv};
  }
  __device__ __forceinline__ Source source(Work const& work, Step const& step) const {
    return {step.token, work.tile.head * params.heads_per_kv + step.head, work.tile.batch};
  }

  __device__ __forceinline__ void load_keys(FullBarrier& barrier, Element* k, Element* v,
                                            Work const& work) const {
    load_box<Traits::kHeadDim>(params.geometry.k, barrier, k, Traits::kTileK, kReadOnce,
                               first_key(work), work.tile.head, work.tile.batch);
    load_box<Traits::kHeadDim>(params.geometry.v, barrier, v, Traits::kTileK, kReadOnce,
                               first_key(work), work.tile.head, work.tile.batch);
  }
  __device__ __forceinline__ void load_q(FullBarrier& barrier, Element* to,
                                         Source const& from) const {
    load_box<Traits::kHeadDim>(params.geometry.q, barrier, to, Traits::kTileQ, kReadByMany,
                               from.token, from.head, from.batch);
  }
  __device__ __forceinline__ void load_dout(FullBarrier& barrier, Element* to,
                                            Source const& from) const {
    load_box<Traits::kHeadDim>(params.geometry.dout, barrier, to, Traits::kTileQ, kReadByMany,
                               from.token, from.head, from.batch);
  }
  __device__ __forceinline__ void load_terms(FullBarrier& barrier, RowTerms* to,
                                             Source const& from) const {
    cute::SM90_TMA_LOAD_4D::copy(&params.geometry.terms, reinterpret_cast<uint64_t*>(&barrier),
                                 static_cast<uint64_t>(kReadByMany), to, 0, from.token, from.head,
                                 from.batch);
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
    // The first column that sees the first of the thread's keys. Of another key it is this and a
    // constant: where first_query is held at 0, any column does for both.
    struct Seen {
      int32_t first;
    };
    __device__ __forceinline__ Seen look_up(Coord const& tile) const {
      auto const& p = geometry_.params.sparsity;
      int32_t const from_end = Mechanism::first_query(p, p.len_kv) - (p.len_kv - key_) * kStep;
      return {from_end - tile[2] - AccumulatorPosition().column};
    }
    static __device__ __forceinline__ bool sees(Seen const& seen, int i) {
      return kStep == 0 ||
             AccumulatorPosition::column_of(i) - 8 * AccumulatorPosition::row_of(i) * kStep >=
                 seen.first;
    }

   private:
    static constexpr int32_t kStep = Mechanism::kStep;
    SequenceKeys const& geometry_;
    int32_t const key_;
  };

  __device__ __forceinline__ void store_dk(Element const* from, Work const& work, int part) const {
    store(params.geometry.dk, from, work, part);
  }
  __device__ __forceinline__ void store_dv(Element const* from, Work const& work, int part) const {
    store(params.geometry.dv, from, work, part);
  }

 private:
  __device__ __forceinline__ int first_key(Work const& work) const {
    return work.tile.q_tile * Traits::kTileK;
  }
  __device__ __forceinline__ void store(CUtensorMap const& map, Element const* from,
                                        Work const& work, int part) const {
    CUTE_UNROLL
    for (int d = 0; d < Traits::kHeadDim; d += 64) {
      cute::SM90_TMA_STORE_4D::copy(&map, from + d * Traits::kTileK, d, first_key(work) + part * 64,
                                    work.tile.head, work.tile.batch);
    }
  }
};

}  // namespace sparse_fmha::sm90
