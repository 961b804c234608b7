// The keys that a query tile sees, a tile of keys at a time.
#pragma once

#include "sparse_fmha/cpu/group_vote.h"
#include "sparse_fmha/cpu/tokens.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// Both walks call load(place, k, v) for each key of a tile, and then visit(keys, masked).
template <class M, class Element>
class KeyTiles : protected Tokens<M, Element> {
 protected:
  KeyTiles(FmhaProblem const& problem, typename M::Params const& params, TileShape const& shape)
      : Tokens<M, Element>(problem, params),
        capacity_(round_up(static_cast<int>(volume(shape.k)), kPanelRows)),
        shape_(shape) {}

  void take_keys(Buffers& buffers) {
    buffers.take(key_position_, capacity_);
    buffers.take(biases_, capacity_);
  }

  template <class Load, class Visit>
  void walk_tiles(QueryTile const& q, Load load, Visit visit) const {
    this->for_each_key_tile(shape_, q, [&](Coord const& tile, bool masked) {
      int const keys =
          this->for_each_key(q.residue, tile, shape_.k, 0, key_position_, biases_, load);
      visit(keys, masked);
    });
    for (int32_t first = 0; first < this->problem_.extra_len; first += capacity_) {
      visit(this->for_each_extra(first, capacity_, biases_, load), false);
    }
  }

  // The tiles on which a group votes, in the order of the forward pass.
  template <class Load, class Visit>
  void walk_voted(Group<M> const& group, Load load, Visit visit) const {
    int keys = 0;
    walk_group(
        this->problem_, shape_, group,
        [&](Coord const& origin, Coord const& extent) {
          keys = this->for_each_key(group.rows.residue, origin, extent, keys, key_position_,
                                    biases_, load);
        },
        [&](int32_t first, int most) { keys = this->for_each_extra(first, most, biases_, load); },
        [&](bool masked) {
          visit(keys, masked);
          keys = 0;
        });
  }

  int const capacity_;  // of a tile of keys, in whole panels
  Coord* key_position_ = nullptr;
  float* biases_ = nullptr;

 private:
  TileShape const& shape_;
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
