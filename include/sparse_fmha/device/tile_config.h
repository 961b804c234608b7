// What the rows of all kernel lists (csrc/kernels/*.def) have.
#pragma once

#include "sparse_fmha/mechanisms/contract.h"

namespace sparse_fmha::device {

// Whether key tiles whose weights are below a threshold are skipped.
enum class Skipping { kNever, kByThreshold };

// The compile-time choices of every kernel; a pass may add some. One type, so profilers and
// disassemblers print them with the kernel.
template <class Mechanism_, class Element_, int HeadDim, int TileQ, int TileK, int Stages>
struct TileConfig {
  using Mechanism = Mechanism_;
  using Element = Element_;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kValueDim = HeadDim;
  static constexpr int kTileQ = TileQ;
  static constexpr int kTileK = TileK;
  static constexpr int kStages = Stages;
  static constexpr bool kKeyBias = false;
  static constexpr int kBlocks = 1;  // thread blocks on a multiprocessor
};

// The same kernel for values of another head dim than q and k.
template <class Config, int ValueDim>
struct WithValueDim : Config {
  static constexpr int kValueDim = ValueDim;
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

}  // namespace sparse_fmha::device
