// What every GPU's code takes of CuTe and CUTLASS, included in this one place.
//
// CuTe has all widths of Hopper's matrix instructions only on request, as to read them all takes
// longer than to compile a kernel. So a file that compiles a kernel for it defines
// SPARSE_FMHA_TILE_K, the keys of a tile, before. Without the width a selector falls back to 16 in
// silence, which sm90/common/tile_traits.h refuses.
#pragma once

#ifdef SPARSE_FMHA_TILE_K
#if SPARSE_FMHA_TILE_K != 16 && SPARSE_FMHA_TILE_K != 32 && SPARSE_FMHA_TILE_K != 64 &&   \
    SPARSE_FMHA_TILE_K != 96 && SPARSE_FMHA_TILE_K != 128 && SPARSE_FMHA_TILE_K != 192 && \
    SPARSE_FMHA_TILE_K != 256
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#endif
#endif

#include <cudaTypedefs.h>  // first: CUTLASS includes it, too, but in a namespace

#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>
