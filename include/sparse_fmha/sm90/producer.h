// The producer warps: one walks the key tiles and keeps their stages filled, and one for each
// consumer loads its queries, so that no consumer waits for another to be done with its own.
#pragma once

#include "sparse_fmha/sm90/cute.h"
#include "sparse_fmha/sm90/params.h"
#include "sparse_fmha/sm90/smem.h"

namespace sparse_fmha::sm90 {

// Cache policies as the copy instructions encode them.
inline constexpr auto kReadOnce = cute::TMA::CacheHintSm90::EVICT_FIRST;
inline constexpr auto kReadByMany = cute::TMA::CacheHintSm90::EVICT_LAST;

// Each role is for one thread of a warp of its own.
template <class Traits, class Mechanism>
struct Producer {
  using Params = KernelParams<Mechanism>;
  using Storage = SharedStorage<Traits>;
  using Element = typename Traits::Element;
  static constexpr int kStages = Traits::kStages;

  Params const& params;
  Storage& smem;

  // Hands out the query tiles and loads their keys and values.
  __device__ __forceinline__ void run_keys() {
    RingState<kStages> state;
    RingState<1> state_work;
    int32_t index = blockIdx.x;
    while (true) {
      WorkTile const work = params.scheduler.decode(index);
      smem.work.put(state_work, work);
      if (work.batch < 0) {
        return;
      }
      index = params.scheduler.take();  // early, so that its latency passes under the copies
      load_keys(work, state);
    }
  }

  // Loads the 64 queries of each tile that are one consumer's.
  __device__ __forceinline__ void run_queries(int consumer) {
    RingState<1> state;  // of the work and of the queries: one of each a tile
    auto& ring = smem.ring_q[consumer];
    while (true) {
      WorkTile const work = smem.work.get(state);
      if (work.batch < 0) {
        return;
      }
      QueryTile const q = Mechanism::query_tile(params.sparsity, Traits::tile_shape(), work.q_tile);
      ring.acquire(state, Traits::kBytesQ / Traits::kConsumers);
      copy(params.q, ring.full[0], smem.q + consumer * 64 * 64, Traits::kTileQ,
           q.origin[2] + consumer * 64, work.head, work.batch, kReadOnce);
      state.advance();
    }
  }

 private:
  // A box of tokens of one head, 64 columns at a time. `rows`: of the shared-memory tile.
  __device__ __forceinline__ void copy(CUtensorMap const& map, FullBarrier& barrier,
                                       Element* destination, int rows, int token, int head,
                                       int batch, cute::TMA::CacheHintSm90 hint) {
    CUTE_UNROLL
    for (int d = 0; d < Traits::kHeadDim; d += 64) {
      cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&barrier),
                                   static_cast<uint64_t>(hint), destination + d * rows, d, token,
                                   head, batch);
    }
  }

  __device__ __forceinline__ void load_stage(CUtensorMap const& map, Ring<kStages>& ring,
                                             RingState<kStages> const& place, Element* stages,
                                             int token, int head, int batch) {
    ring.acquire(place, Traits::kBytesK);
    copy(map, ring.full[place.index], stages + place.index * Storage::kTileElements, Traits::kTileK,
         token, head, batch, kReadByMany);
  }

  // In the order of use: a consumer multiplies the next key tile before the present value tile.
  __device__ __forceinline__ void load_keys(WorkTile const& work, RingState<kStages>& state) {
    TileShape const shape = Traits::tile_shape();
    QueryTile const q = Mechanism::query_tile(params.sparsity, shape, work.q_tile);
    auto const walk = Mechanism::walk(params.sparsity, shape, q);
    int const tiles = walk.num_partial + walk.num_full;
    int const head_kv = work.head / params.heads_per_kv;
    RingState<kStages> previous;
    CUTE_NO_UNROLL
    for (int i = 0; i <= tiles; ++i) {
      if (i < tiles) {
        load_stage(params.k, smem.ring_k, state, smem.k, walk.tile(i)[2], head_kv, work.batch);
      }
      if (i > 0) {
        load_stage(params.v, smem.ring_v, previous, smem.v, walk.tile(i - 1)[2], head_kv,
                   work.batch);
      }
      previous = state;
      if (i < tiles) {
        state.advance();
      }
    }
  }
};

}  // namespace sparse_fmha::sm90
