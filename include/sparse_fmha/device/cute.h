// The CuTe and CUTLASS headers for code of all GPUs, included in one place.
//
// CuTe defines all widths of Hopper's matrix instructions only on request, because reading all of
// them takes longer than compiling a kernel. A file that compiles a Hopper kernel therefore defines
// SPARSE_FMHA_TILE_K, the keys of a tile, first. Without the right width a selector silently falls
// back to 16, which sm90/common/tile_traits.h rejects.
#pragma once

#ifdef SPARSE_FMHA_TILE_K
#if SPARSE_FMHA_TILE_K != 16 && SPARSE_FMHA_TILE_K != 32 && SPARSE_FMHA_TILE_K != 64 &&   \
    SPARSE_FMHA_TILE_K != 96 && SPARSE_FMHA_TILE_K != 128 && SPARSE_FMHA_TILE_K != 192 && \
    SPARSE_FMHA_TILE_K != 256
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#endif
#endif

#include <cudaTypedefs.h>  // first, because CUTLASS includes it inside a namespace

#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>
