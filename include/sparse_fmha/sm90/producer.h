// The producer warp: walks the key tiles of a query tile and keeps the stages filled.
#pragma once

#include "sparse_fmha/sm90/cute.h"
#include "sparse_fmha/sm90/params.h"
#include "sparse_fmha/sm90/smem.h"

namespace sparse_fmha::sm90 {

// Cache policies as the copy instructions encode them.
inline constexpr auto kReadOnce = cute::TMA::CacheHintSm90::EVICT_FIRST;
inline constexpr auto kReadByMany = cute::TMA::CacheHintSm90::EVICT_LAST;

// One thread runs this.
template <class Traits, class Mechanism>
struct Producer {
  using Params = KernelParams<Mechanism>;
  using Storage = SharedStorage<Traits>;
  using Element = typename Traits::Element;
  static constexpr int kStages = Traits::kStages;

  Params const& params;
  Storage& smem;
  RingState<kStages> state;  // of the next key tile; its value tile will take the same place

  __device__ __forceinline__ void run() {
    RingState<1> state_q;
    RingState<1> state_work;
    int32_t index = blockIdx.x;
    while (true) {
      WorkTile const work = params.scheduler.decode(index);
      smem.ring_work.empty[0].wait(state_work.phase ^ 1);
      smem.work = work;
      smem.ring_work.full[0].arrive();
      state_work.advance();
      if (work.batch < 0) {
        return;
      }
      index = params.scheduler.take();  // early, so that its latency passes under the copies
      load(work, state_q);
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
  __device__ __forceinline__ void load(WorkTile const& work, RingState<1>& state_q) {
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
      } else {
        load_q(work, q, state_q);
      }
      previous = state;
      if (i < tiles) {
        state.advance();
      }
    }
  }

  __device__ __forceinline__ void load_q(WorkTile const& work, QueryTile const& q,
                                         RingState<1>& state_q) {
    CUTE_NO_UNROLL
    for (int w = 0; w < Traits::kConsumers; ++w) {
      smem.ring_q[w].acquire(state_q, Traits::kBytesQ / Traits::kConsumers);
      copy(params.q, smem.ring_q[w].full[0], smem.q + w * 64 * 64, Traits::kTileQ,
           q.origin[2] + w * 64, work.head, work.batch, kReadOnce);
    }
    state_q.advance();
  }
};

}  // namespace sparse_fmha::sm90
