// In which order a key tile visits the query tiles of a head, which are numbered like its walk.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"

namespace sparse_fmha::sm90 {

struct Ascending {
  static __device__ __forceinline__ int first(int /*tiles*/) { return 0; }
  // After the last tile comes the first one, of the next head.
  static __device__ __forceinline__ int next(int tile, int tiles) {
    return tile + 1 == tiles ? 0 : tile + 1;
  }
};

struct Descending {
  static __device__ __forceinline__ int first(int tiles) { return tiles - 1; }
  static __device__ __forceinline__ int next(int tile, int tiles) {
    return tile == 0 ? tiles - 1 : tile - 1;
  }
};

}  // namespace sparse_fmha::sm90
