// Boxes on a grid by tensor maps of dilation classes (planning/class_boxes.h): any dilation, all
// heads and batch entries, and for each tensor a map for each kind of class.
#pragma once

#include <cuda.h>

#include "sparse_fmha/planning/class_boxes.h"
#include "sparse_fmha/sm90/common/copy.h"
#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

template <class Traits>
struct ClassBoxes {
  using Element = typename Traits::Element;

  struct Maps {
    CUtensorMap q[Traits::kQueryTensors][kClassKinds];  // (D, X, Y, T, offset)
    CUtensorMap k[kClassKinds];
    CUtensorMap v[kClassKinds];
    CUtensorMap out[kClassKinds];
  };
  struct Numbers {
    ClassUnits q[Traits::kQueryTensors];
    ClassUnits k;
    ClassUnits v;
    ClassUnits out;
  };
  // Of a query tile: the kind of its class, and the offsets of the class, head and batch entry.
  struct Origin {
    int32_t kind;
    int32_t offset_q[Traits::kQueryTensors];
    int32_t offset_k;
    int32_t offset_v;
    int32_t offset_out;
  };
  // Where a box lies: its coordinates. Begins like BoxSource.
  struct Source {
    int32_t map;  // the kind of class; negative: the extra tokens
    int32_t head;
    int32_t place[3];
    int32_t offset_k;
    int32_t offset_v;
  };

  template <class Params, class Work>
  static __device__ __forceinline__ void locate(Params const& params, Work& work) {
    Numbers const& units = params.geometry.places;
    Coord const first = work.q.residue;
    work.kind = class_kind(params.sparsity, first);
    int32_t const batch = work.tile.batch;
    CUTE_UNROLL
    for (int i = 0; i < Traits::kQueryTensors; ++i) {
      work.offset_q[i] = units.q[i].offset(batch, work.tile.head, first);
    }
    work.offset_k = units.k.offset(batch, work.head_kv, first);
    work.offset_v = units.v.offset(batch, work.head_kv, first);
    work.offset_out = units.out.offset(batch, work.tile.head, first);
  }

  template <class Params, class Work>
  static __device__ __forceinline__ Source source(Params const& /*params*/, Work const& work,
                                                  Coord const& position, int32_t /*head*/) {
    return {work.kind, 0, {position[2], position[1], position[0]}, work.offset_k, work.offset_v};
  }
  template <class Params, class Work>
  static __device__ __forceinline__ void load_q(Params const& params, FullBarrier& barrier,
                                                Element* destination, Work const& work,
                                                Coord const& position) {
    CUTE_UNROLL
    for (int i = 0; i < Traits::kQueryTensors; ++i) {
      load_box<Traits::kHeadDim>(params.geometry.q[i][work.kind], barrier,
                                 destination + i * Traits::kTileQ * Traits::kHeadDim,
                                 Traits::kTileQ, kReadOnce, position[2], position[1], position[0],
                                 work.offset_q[i]);
    }
  }
  static __device__ __forceinline__ void load_k(Maps const& maps, FullBarrier& barrier,
                                                Element* destination, Source const& from) {
    load(maps.k[from.map], barrier, destination, from, from.offset_k);
  }
  static __device__ __forceinline__ void load_v(Maps const& maps, FullBarrier& barrier,
                                                Element* destination, Source const& from) {
    load(maps.v[from.map], barrier, destination, from, from.offset_v);
  }
  template <class Params, class Work>
  static __device__ __forceinline__ void store_out(Params const& params, Element const* from,
                                                   Work const& work, Coord const& position) {
    CUtensorMap const& map = params.geometry.out[work.kind];
    CUTE_UNROLL
    for (int d = 0; d < Traits::kHeadDim; d += 64) {
      cute::SM90_TMA_STORE_5D::copy(&map, from + d * Traits::kTileQ, d, position[2], position[1],
                                    position[0], work.offset_out);
    }
  }

 private:
  static __device__ __forceinline__ void load(CUtensorMap const& map, FullBarrier& barrier,
                                              Element* destination, Source const& from,
                                              int32_t offset) {
    load_box<Traits::kHeadDim>(map, barrier, destination, Traits::kTileK, kReadByMany,
                               from.place[0], from.place[1], from.place[2], offset);
  }
};

}  // namespace sparse_fmha::sm90
