// A row of the lists of backward kernels, csrc/kernels/sm90_backward_*.def.
#pragma once

#include "sparse_fmha/mechanisms/contract.h"

namespace sparse_fmha::sm90 {

// All compile-time choices of a kernel. One type, so profilers and disassemblers print them with
// the kernel.
template <class Mechanism_, class Element_, int HeadDim, int TileQ, int TileK, int Stages>
struct BackwardConfig {
  using Mechanism = Mechanism_;
  using Element = Element_;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kTileQ = TileQ;
  static constexpr int kTileK = TileK;
  static constexpr int kStages = Stages;
};

}  // namespace sparse_fmha::sm90
