// Lists transposed to the keys' side, computed on the device.
#pragma once

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/planning/transposed_lists.h"

namespace sparse_fmha::device {

// A bit for each key, 32 to a word, of each row of the lists: whether a group lists it. In the
// context's memory.
uint32_t const* mark_listed_keys(Stripe::Params const& params, int64_t rows,
                                 ExecutionContext const& context);

// Launches the kernels that fill the lists, for key tiles of one or two parts. Nothing is read back
// to the host: sizes follow from shapes, and steps are in ascending order. Params: those of
// BlockSparse or Stripe.
template <class Params>
TransposedLists transpose_lists(Params const& params, FmhaProblem const& problem,
                                int32_t parts_per_tile, ExecutionContext const& context);

}  // namespace sparse_fmha::device
