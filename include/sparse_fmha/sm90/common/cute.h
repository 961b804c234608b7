// CuTe and CUTLASS for Hopper, included in this one place.
//
// CuTe has all widths of matrix instructions only on request, as to read them all takes longer than
// to compile a kernel. So a file that compiles a kernel defines SPARSE_FMHA_TILE_K, the keys of a
// tile, before. Without the width a selector falls back to 16 in silence, which tile_traits.h
// refuses.
#pragma once

#ifdef SPARSE_FMHA_TILE_K
#if SPARSE_FMHA_TILE_K != 16 && SPARSE_FMHA_TILE_K != 32 && SPARSE_FMHA_TILE_K != 64 &&   \
    SPARSE_FMHA_TILE_K != 96 && SPARSE_FMHA_TILE_K != 128 && SPARSE_FMHA_TILE_K != 192 && \
    SPARSE_FMHA_TILE_K != 256
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#endif
#endif

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "sparse_fmha/device/cute.h"

namespace sparse_fmha::device {}

namespace sparse_fmha::sm90 {
using namespace device;  // what any GPU can run
}
