// The backward pass of a neighborhood of kept tiles, as one of lists of key blocks.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::device {

// The tokens of rows of the copies; negative: none.
struct WindowTokens {
  int32_t const* of_rows;  // of queries; nullptr: nothing was copied
  int32_t const* of_keys;
  int32_t keys;  // without extra tokens
};

// Lists over the tensors, if their tokens are in the order of groups and boxes, or over copies:
// query rows in the order of groups, filled up to 64, keys box by box (planning/kept_windows.h),
// and extra tokens behind them.
struct KeptWindows {
  FmhaProblem problem;  // its gradients are the next member, wherever this is
  Gradients gradients;
  WindowTokens tokens;
};

// `problem` has gradients, with row terms, and the bits of the tiles that `forward` skipped. Each
// group has lists of blocks of 32 keys, with bitmasks where not all of its rows see all keys.
// Nothing is read back to the host.
KeptWindows copy_kept_windows(FmhaProblem const& problem, KernelInfo const& forward,
                              ExecutionContext const& context);

// Copies the gradients that are wanted to those of `problem`, if they are not these.
void return_gradients(FmhaProblem const& problem, KeptWindows const& windows,
                      ExecutionContext const& context);

}  // namespace sparse_fmha::device
