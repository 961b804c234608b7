// A row of a kernel list, csrc/kernels/sm90_*.def.
#pragma once

#include "sparse_fmha/mechanisms/contract.h"

namespace sparse_fmha::sm90 {

// The compile-time choices of every pass; for all but the forward pass, these are all. One type, so
// profilers and disassemblers print them with the kernel.
template <class Mechanism_, class Element_, int HeadDim, int TileQ, int TileK, int Stages>
struct TileConfig {
  using Mechanism = Mechanism_;
  using Element = Element_;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kTileQ = TileQ;
  static constexpr int kTileK = TileK;
  static constexpr int kStages = Stages;
  static constexpr bool kKeyBias = false;
  static constexpr int kBlocks = 1;  // thread blocks on a multiprocessor
};

// The same kernel with several thread blocks on a multiprocessor.
template <class Config, int Blocks>
struct WithBlocks : Config {
  static constexpr int kBlocks = Blocks;
};

// The same kernel, whose keys have biases.
template <class Config>
struct WithKeyBias : Config {
  static constexpr bool kKeyBias = true;
};

}  // namespace sparse_fmha::sm90
