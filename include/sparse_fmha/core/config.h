// Host/device annotations and small integer types shared by all layers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SPARSE_FMHA_HD __host__ __device__ __forceinline__
#else
#define SPARSE_FMHA_HD inline
#endif

namespace sparse_fmha {

// A token grid always has three axes, slowest first: (T, Y, X). A sequence is {1, 1, L}, an image
// {1, Y, X}. A fixed rank keeps the walks free of rank branches.
inline constexpr int kGridAxes = 3;

struct Coord {
  int32_t v[kGridAxes];
  SPARSE_FMHA_HD int32_t& operator[](int axis) { return v[axis]; }
  SPARSE_FMHA_HD int32_t operator[](int axis) const { return v[axis]; }
};

SPARSE_FMHA_HD int64_t volume(Coord const& c) { return static_cast<int64_t>(c[0]) * c[1] * c[2]; }

SPARSE_FMHA_HD bool operator==(Coord const& a, Coord const& b) {
  return a[0] == b[0] && a[1] == b[1] && a[2] == b[2];
}

SPARSE_FMHA_HD constexpr int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
inline int32_t log2_floor(int32_t n) { return 31 - __builtin_clz(static_cast<uint32_t>(n)); }
SPARSE_FMHA_HD constexpr int32_t min_int(int32_t a, int32_t b) { return a < b ? a : b; }
SPARSE_FMHA_HD constexpr int32_t max_int(int32_t a, int32_t b) { return a > b ? a : b; }

}  // namespace sparse_fmha
