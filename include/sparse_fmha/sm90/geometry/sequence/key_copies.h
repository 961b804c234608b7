// Copies of the dK/dV kernel on one axis of tokens: key tiles, and the query tiles that see them.
#pragma once

#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/sm90/backward/row_terms.h"
#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

// Where a query tile lies.
struct QuerySource {
  int32_t token;
  int32_t head;
  int32_t batch;
};

template <class Traits>
struct KeyCopies {
  using Element = typename Traits::Element;

  CUtensorMap k;      // (D, Lkv, Hkv, B)
  CUtensorMap v;      // (D, Lkv, Hkv, B)
  CUtensorMap q;      // (D, Lq, Hq, B)
  CUtensorMap dout;   // (D, Lq, Hq, B)
  CUtensorMap terms;  // (4, Lq, Hq, B)
  CUtensorMap dk;     // (D, Lkv, Hkv, B)
  CUtensorMap dv;     // (D, Lkv, Hkv, B)

  // The index of a key tile is stored as q_tile.
  static __device__ __forceinline__ int first_key(WorkTile const& tile) {
    return tile.q_tile * Traits::kTileK;
  }
  __device__ __forceinline__ void load_keys(FullBarrier& barrier, Element* to_k, Element* to_v,
                                            WorkTile const& tile) const {
    load_box<Traits::kHeadDim>(k, barrier, to_k, Traits::kTileK, kReadOnce, first_key(tile),
                               tile.head, tile.batch);
    load_box<Traits::kHeadDim>(v, barrier, to_v, Traits::kTileK, kReadOnce, first_key(tile),
                               tile.head, tile.batch);
  }
  __device__ __forceinline__ void load_q(FullBarrier& barrier, Element* to,
                                         QuerySource const& from) const {
    load_box<Traits::kHeadDim>(q, barrier, to, Traits::kTileQ, kReadByMany, from.token, from.head,
                               from.batch);
  }
  __device__ __forceinline__ void load_dout(FullBarrier& barrier, Element* to,
                                            QuerySource const& from) const {
    load_box<Traits::kHeadDim>(dout, barrier, to, Traits::kTileQ, kReadByMany, from.token,
                               from.head, from.batch);
  }
  __device__ __forceinline__ void load_terms(FullBarrier& barrier, RowTerms* to,
                                             QuerySource const& from) const {
    cute::SM90_TMA_LOAD_4D::copy(&terms, reinterpret_cast<uint64_t*>(&barrier),
                                 static_cast<uint64_t>(kReadByMany), to, 0, from.token, from.head,
                                 from.batch);
  }
  // Stores 64 rows of a tile to dk or dv, clipped to the tensor.
  static __device__ __forceinline__ void store(CUtensorMap const& map, Element const* from,
                                               WorkTile const& tile, int part) {
    CUTE_UNROLL
    for (int d = 0; d < Traits::kHeadDim; d += 64) {
      cute::SM90_TMA_STORE_4D::copy(&map, from + d * Traits::kStoredRows, d,
                                    first_key(tile) + part * 64, tile.head, tile.batch);
    }
  }
};

}  // namespace sparse_fmha::sm90
