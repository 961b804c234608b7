// Boxes on a grid by tensor maps of all tokens. A dilated box has strides between its elements, so
// the dilation is one that TMA strides over.
#pragma once

#include <cuda.h>

#include "sparse_fmha/mechanisms/contract.h"
#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/geometry/grid/grid_walk.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Mechanism>
struct StridedBoxes {
  using Element = typename Traits::Element;
  using Source = BoxSource;

  // TMA supports five axes. With three token axes none is left for the batch: each batch entry
  // needs its own tensor map, and one launch takes at most this many.
  static constexpr int kMaxMaps = 6;

  struct Maps {
    // (D, H, X, Y, B), or (D, H, X, Y, T) for each batch entry
    CUtensorMap q[Traits::kQueryTensors][kMaxMaps];
    CUtensorMap k[kMaxMaps];
    CUtensorMap v[kMaxMaps];
    CUtensorMap out[kMaxMaps];
  };
  struct Numbers {
    bool map_per_batch;
  };
  struct Origin {};  // of a query tile, which knows it already

  template <class Params, class Work>
  static __device__ __forceinline__ void locate(Params const& /*params*/, Work& /*work*/) {}

  template <class Params, class Work>
  static __device__ __forceinline__ Source source(Params const& params, Work const& work,
                                                  Coord const& position, int32_t head) {
    Coord const token = Mechanism::token(params.sparsity, work.q.residue, position);
    bool const per_batch = params.geometry.places.map_per_batch;
    return {per_batch ? work.tile.batch : 0,
            head,
            {token[2], token[1], per_batch ? token[0] : work.tile.batch}};
  }
  template <class Params, class Work>
  static __device__ __forceinline__ void load_q(Params const& params, FullBarrier& barrier,
                                                Element* destination, Work const& work,
                                                Coord const& position) {
    auto const from = source(params, work, position, work.tile.head);
    CUTE_UNROLL
    for (int i = 0; i < Traits::kQueryTensors; ++i) {
      load(params.geometry.q[i][from.map], barrier,
           destination + i * Traits::kTileQ * Traits::kHeadDim, Traits::kTileQ, from, kReadOnce);
    }
  }
  static __device__ __forceinline__ void load_k(Maps const& maps, FullBarrier& barrier,
                                                Element* destination, Source const& from) {
    load(maps.k[from.map], barrier, destination, Traits::kTileK, from, kReadByMany);
  }
  static __device__ __forceinline__ void load_v(Maps const& maps, FullBarrier& barrier,
                                                Element* destination, Source const& from) {
    load(maps.v[from.map], barrier, destination, Traits::kTileK, from, kReadByMany);
  }
  template <class Params, class Work>
  static __device__ __forceinline__ void store_out(Params const& params, Element const* from,
                                                   Work const& work, Coord const& position) {
    auto const to = source(params, work, position, work.tile.head);
    CUTE_UNROLL
    for (int d = 0; d < Traits::kHeadDim; d += 64) {
      cute::SM90_TMA_STORE_5D::copy(&params.geometry.out[to.map], from + d * Traits::kTileQ, d,
                                    to.head, to.place[0], to.place[1], to.place[2]);
    }
  }

 private:
  static __device__ __forceinline__ void load(CUtensorMap const& map, FullBarrier& barrier,
                                              Element* destination, int rows, Source const& from,
                                              cute::TMA::CacheHintSm90 hint) {
    load_box<Traits::kHeadDim>(map, barrier, destination, rows, hint, from.head, from.place[0],
                               from.place[1], from.place[2]);
  }
};

}  // namespace sparse_fmha::sm90
