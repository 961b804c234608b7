// Boxes on a grid by tensor maps of dilation classes (planning/class_boxes.h): any dilation, all
// heads and batch entries, and one map for each tensor.
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
    CUtensorMap q[Traits::kQueryTensors];  // (D, X, Y, T, offset)
    CUtensorMap k;
    CUtensorMap v;
    CUtensorMap out;
  };
  struct Numbers {
    ClassUnits q[Traits::kQueryTensors];
    ClassUnits k;
    ClassUnits v;
    ClassUnits out;
  };
  // Of a query tile: the elements at position 0, and the offsets of its class, head and batch
  // entry.
  struct Origin {
    Coord first;
    int32_t offset_q[Traits::kQueryTensors];
    int32_t offset_k;
    int32_t offset_v;
    int32_t offset_out;
  };
  // Where a box lies: its coordinates. Begins like BoxSource.
  struct Source {
    int32_t map;  // negative: the extra tokens
    int32_t head;
    int32_t place[3];
    int32_t offset_k;
    int32_t offset_v;
  };

  template <class Params, class Work>
  static __device__ __forceinline__ void locate(Params const& params, Work& work) {
    Numbers const& units = params.geometry.places;
    ClassOrigin const origin = class_origin(params.sparsity, work.q.residue);
    work.first = origin.position;
    int32_t const batch = work.tile.batch;
    CUTE_UNROLL
    for (int i = 0; i < Traits::kQueryTensors; ++i) {
      work.offset_q[i] = units.q[i].offset(batch, work.tile.head, origin.token);
    }
    work.offset_k = units.k.offset(batch, work.head_kv, origin.token);
    work.offset_v = units.v.offset(batch, work.head_kv, origin.token);
    work.offset_out = units.out.offset(batch, work.tile.head, origin.token);
  }

  template <class Params, class Work>
  static __device__ __forceinline__ Source source(Params const& /*params*/, Work const& work,
                                                  Coord const& position, int32_t /*head*/) {
    Coord const at = element(work, position);
    return {0, 0, {at[2], at[1], at[0]}, work.offset_k, work.offset_v};
  }
  template <class Params, class Work>
  static __device__ __forceinline__ void load_q(Params const& params, FullBarrier& barrier,
                                                Element* destination, Work const& work,
                                                Coord const& position) {
    Coord const at = element(work, position);
    CUTE_UNROLL
    for (int i = 0; i < Traits::kQueryTensors; ++i) {
      load_box<Traits::kHeadDim>(params.geometry.q[i], barrier,
                                 destination + i * Traits::kTileQ * Traits::kHeadDim,
                                 Traits::kTileQ, kReadOnce, at[2], at[1], at[0], work.offset_q[i]);
    }
  }
  static __device__ __forceinline__ void load_k(Maps const& maps, FullBarrier& barrier,
                                                Element* destination, Source const& from) {
    load(maps.k, barrier, destination, from, from.offset_k);
  }
  static __device__ __forceinline__ void load_v(Maps const& maps, FullBarrier& barrier,
                                                Element* destination, Source const& from) {
    load(maps.v, barrier, destination, from, from.offset_v);
  }
  template <class Params, class Work>
  static __device__ __forceinline__ void store_out(Params const& params, Element const* from,
                                                   Work const& work, Coord const& position) {
    Coord const at = element(work, position);
    CUTE_UNROLL
    for (int d = 0; d < Traits::kHeadDim; d += 64) {
      cute::SM90_TMA_STORE_5D::copy(&params.geometry.out, from + d * Traits::kTileQ, d, at[2],
                                    at[1], at[0], work.offset_out);
    }
  }

 private:
  template <class Work>
  static __device__ __forceinline__ Coord element(Work const& work, Coord const& position) {
    return {work.first[0] + position[0], work.first[1] + position[1], work.first[2] + position[2]};
  }
  static __device__ __forceinline__ void load(CUtensorMap const& map, FullBarrier& barrier,
                                              Element* destination, Source const& from,
                                              int32_t offset) {
    load_box<Traits::kHeadDim>(map, barrier, destination, Traits::kTileK, kReadByMany,
                               from.place[0], from.place[1], from.place[2], offset);
  }
};

}  // namespace sparse_fmha::sm90
