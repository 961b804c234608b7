// Stripes as block lists over copies of the keys that each group of query rows lists. Integer
// arithmetic, shared by the kernels (device/gathered_keys.h) and the host.
//
// The copies of a group are in the order of the tokens, and start at a multiple of kGatheredBlock.
// So only the last block of a group, and those that the diagonal cuts, need bitmasks.
#pragma once

#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

inline constexpr int32_t kGatheredBlock = 128;  // keys
// The copy of a block's place behind the last key of its group.
inline constexpr int32_t kNoToken = INT32_MAX;

// Keys that a group can list, from the widths of its lists.
SPARSE_FMHA_HD int64_t most_listed(Stripe::Params const& p) {
  int64_t const runs = p.ranges.counts == nullptr ? 0 : int64_t{p.ranges.width} * p.range_size;
  int64_t const all = p.columns.width + runs;
  return all < p.len_kv ? all : p.len_kv;
}

SPARSE_FMHA_HD int32_t blocks_of_group(Stripe::Params const& p) {
  auto const listed = static_cast<int32_t>(most_listed(p));
  return max_int(ceil_div(listed, kGatheredBlock), 1);
}
SPARSE_FMHA_HD int32_t gathered_rows(Stripe::Params const& p) {
  return p.block_q % 128 == 0 ? 128 : 64;
}
// Of blocks with bitmasks that a block of query rows lists at most. Each row of the block sees one
// more token than the row before it: these lie in two blocks, and another is the last one.
SPARSE_FMHA_HD int32_t most_partial(Stripe::Params const& p) {
  return min_int(p.causal ? 3 : 1, blocks_of_group(p));
}

// How the rows of a block see a block of copies whose first and last tokens are these, of `count`
// keys.
enum class GatheredUse { kNone, kFull, kPartial };
SPARSE_FMHA_HD GatheredUse gathered_use(Stripe::Params const& p, int32_t first_row, int32_t rows,
                                        int32_t first, int32_t last, int32_t count) {
  int32_t const last_row = min_int(first_row + rows, p.len_q) - 1;
  if (count <= 0 || first >= Stripe::limit(p, last_row)) {
    return GatheredUse::kNone;
  }
  bool const whole = count == kGatheredBlock && last < Stripe::limit(p, first_row);
  return whole ? GatheredUse::kFull : GatheredUse::kPartial;
}

// Why the gradients of keys walk over the lists of all groups, or nullptr. Otherwise keys are
// gathered: each group has copies of the keys that it lists, and their gradients are added up. A
// copied key takes as long as 1280 more rows. Without copies the kernel takes the time of up to all
// pairs (docs/lab/2026-11-30g-gathered-keys.md). listed: the room in a group's lists.
inline char const* why_not_gathered(int32_t block_q, int64_t listed, int32_t len_kv) {
  constexpr int64_t kRowsOfCopy = 1280;
  bool const few = listed * (block_q + kRowsOfCopy) < 3 * int64_t{len_kv} * block_q;
  return few ? nullptr
             : "lists have room for so many keys that copies may take longer than all keys";
}
inline char const* why_not_gathered(FmhaProblem const& p) {
  auto const* const stripe = std::get_if<Stripe::Params>(&p.sparsity);
  if (stripe == nullptr) {
    return "keys are not listed one by one";
  }
  constexpr int32_t kLargestWithThresholds = 128;  // of block lists
  if (p.row_threshold.data != nullptr &&
      (p.head_dim > kLargestWithThresholds || p.value_dim > kLargestWithThresholds)) {
    return "block lists take no row_threshold above head dim 128";
  }
  constexpr int64_t kMostKeys = 1 << 30;  // of lists
  int64_t const copies =
      int64_t{ceil_div(stripe->len_q, stripe->block_q)} * blocks_of_group(*stripe) * kGatheredBlock;
  if (copies > kMostKeys) {
    return "there would be more than 2^30 copies of keys";
  }
  return why_not_gathered(stripe->block_q, most_listed(*stripe), stripe->len_kv);
}

// Batch entries and key heads whose copies exist at a time.
struct GatheredPart {
  int32_t first_batch;
  int32_t batch;
  int32_t first_head;
  int32_t heads;
};

// Parts have all heads, or one batch entry. Copies of keys and values and their gradients take at
// most kMostBytes, or those of one key head if these take more.
struct GatheredParts {
  static constexpr int64_t kMostBytes = int64_t{1} << 31;
  int32_t batch;
  int32_t heads;
  int32_t batch_of_part;
  int32_t heads_of_part;
  int32_t heads_parts;

  explicit GatheredParts(FmhaProblem const& p);
  int32_t count() const { return ceil_div(batch, batch_of_part) * heads_parts; }
  GatheredPart operator[](int32_t i) const {
    int32_t const first_batch = i / heads_parts * batch_of_part;
    int32_t const first_head = i % heads_parts * heads_of_part;
    return {first_batch, min_int(batch_of_part, batch - first_batch), first_head,
            min_int(heads_of_part, heads - first_head)};
  }
};

// Query heads that have copies of a key head of their own: those of a group that share no list.
inline int32_t copies_of_head(FmhaProblem const& p) {
  return std::get<Stripe::Params>(p.sparsity).head_stride == 0 ? 1 : p.heads_q / p.heads_kv;
}

inline GatheredParts::GatheredParts(FmhaProblem const& p) : batch(p.batch), heads(p.heads_kv) {
  auto const& stripe = std::get<Stripe::Params>(p.sparsity);
  int64_t const keys = int64_t{ceil_div(stripe.len_q, stripe.block_q)} * blocks_of_group(stripe) *
                       kGatheredBlock * copies_of_head(p);
  int64_t const of_head = keys * (p.head_dim + p.value_dim) * 2 * 2;  // 16 bits; and gradients
  int64_t const fit = kMostBytes / of_head;
  if (fit >= heads) {
    batch_of_part = static_cast<int32_t>(fit / heads < batch ? fit / heads : batch);
    heads_of_part = heads;
  } else {
    batch_of_part = 1;
    // As many as in every other part.
    int32_t const most = max_int(static_cast<int32_t>(fit), 1);
    heads_of_part = ceil_div(heads, ceil_div(heads, most));
  }
  heads_parts = ceil_div(heads, heads_of_part);
}

}  // namespace sparse_fmha
