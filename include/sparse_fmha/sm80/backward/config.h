// A row of a kernel list of the backward pass, csrc/kernels/sm80_backward_*.def and sm86_*.
#pragma once

#include "sparse_fmha/core/arch.h"
#include "sparse_fmha/device/tile_config.h"

namespace sparse_fmha::sm80 {

// Of the two tensors that stay with a thread block, those whose fragments are kept in registers.
enum class Held { kNone, kFirst, kSecond, kBoth };

template <class Mechanism_, class Element_, int HeadDim, int TileQ, int TileK, int Stages,
          int Warps, int Sharing, Held Held_, Arch Arch_>
struct BackwardConfig : device::TileConfig<Mechanism_, Element_, HeadDim, TileQ, TileK, Stages> {
  static constexpr int kWarps = Warps;
  static constexpr int kSharing = Sharing;
  static constexpr Held kHeld = Held_;
  static constexpr Arch kArch = Arch_;
  // The warps have the same number of rows each.
  template <int kRows>
  using WithTileQ = BackwardConfig<Mechanism_, Element_, HeadDim, kRows, TileK, Stages,
                                   Warps * kRows / TileQ, Sharing, Held_, Arch_>;
};

}  // namespace sparse_fmha::sm80
