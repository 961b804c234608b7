// The backward pass of stripes, as one of block lists over copies of the listed keys.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/planning/gathered_keys.h"

namespace sparse_fmha::device {

// What each group of query rows lists, one row of each array for each list and group.
struct ListedKeys {
  uint32_t const* listed;  // [rows, words]: a bit for each key
  int32_t const* ranks;    // [rows, words]: listed keys in earlier words
  int32_t const* tokens;   // [rows, capacity]: the keys in ascending order, then kNoToken
  int32_t const* counts;   // [rows]
  BlockSparse::Params blocks;
  int32_t words;
  int32_t capacity;  // of a group, a multiple of kGatheredBlock
};

// Launches the kernels that read the lists of all batch entries and heads, and write block lists
// over the copies. Nothing is read back to the host.
ListedKeys list_keys(FmhaProblem const& problem, ExecutionContext const& context);

// Block lists over copies of the keys of a part.
struct GatheredKeys {
  FmhaProblem problem;  // its gradients are the next member, wherever this is
  Gradients gradients;
};

// `problem` has gradients, with row terms.
GatheredKeys gather_keys(FmhaProblem const& problem, ListedKeys const& keys,
                         GatheredPart const& part, ExecutionContext const& context);

// What gather_keys and add_gathered do about biases and thresholds, if there are any.
void gather_biases(FmhaProblem const& problem, ListedKeys const& keys, GatheredPart const& part,
                   GatheredKeys& gathered, ExecutionContext const& context);
void add_biases(FmhaProblem const& problem, ListedKeys const& keys, GatheredPart const& part,
                GatheredKeys const& gathered, ExecutionContext const& context);

// Writes dQ of a part to that of `problem`, if the kernels did not.
void return_queries(FmhaProblem const& problem, GatheredPart const& part,
                    GatheredKeys const& gathered, ExecutionContext const& context);

// Adds up the gradients of the copies in the order of query heads and groups, in fp32, and writes
// them to those of `problem`, for the heads of the part.
void add_gathered(FmhaProblem const& problem, ListedKeys const& keys, GatheredPart const& part,
                  GatheredKeys const& gathered, ExecutionContext const& context);

}  // namespace sparse_fmha::device
