// CuTe and CUTLASS, included in this one place so that the settings below hold everywhere.
#pragma once

// Matrix instructions of every width that is a multiple of 16, not only of the usual ones, for the
// kernels that need one: to read them takes longer than to compile a kernel. Without them a
// selector falls back to width 16 in silence, which traits.h refuses.
#ifdef SPARSE_FMHA_ALL_MMA_WIDTHS
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#endif

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>
