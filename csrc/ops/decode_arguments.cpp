#include "decode_arguments.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "check.h"
#include "list_arguments.h"
#include "placement.h"

namespace sparse_fmha {
namespace {

using torch::headeronly::ScalarType;

// The split on the CPU where none is given: fixed, so that a result depends on its own request
// alone. Long enough that merging costs nothing, short enough that one long request keeps all
// threads busy.
constexpr int32_t kDefaultSplit = 1024;

void check_dtype(char const* name, Tensor const& t, ScalarType dtype, Tensor const& q) {
  require(t.scalar_type() == dtype, name, " must have dtype ", torch::headeronly::toString(dtype),
          ", got ", torch::headeronly::toString(t.scalar_type()));
  check_memory(name, t, q);
}

// The axes of a table by their letters: B requests, Q queries, H KV heads, N entries. Lower case:
// may also be 1, which all share.
IndexTable table_of(char const* name, Tensor const& t, char const* axes, FmhaProblem const& problem,
                    Tensor const& q) {
  check_dtype(name, t, ScalarType::Int, q);
  IndexTable table;
  int64_t d = 0;
  bool fits = true;
  for (char const* axis = axes; *axis != 0; ++axis, ++d) {
    char const letter = static_cast<char>(*axis & ~0x20);
    bool const may_be_one = *axis != letter;
    int64_t const wanted = letter == 'B'   ? problem.batch
                           : letter == 'Q' ? problem.grid_q[kGridAxes - 1]
                           : letter == 'H' ? problem.heads_kv
                                           : -1;
    if (d >= t.dim()) {
      continue;
    }
    fits &= wanted < 0 || t.size(d) == wanted || (may_be_one && t.size(d) == 1);
    int64_t const stride = t.size(d) == 1 ? 0 : t.stride(d);
    (letter == 'B'   ? table.batch_stride
     : letter == 'Q' ? table.query_stride
     : letter == 'H' ? table.head_stride
                     : table.stride) = stride;
    if (letter == 'N') {
      require(t.size(d) <= (1 << 30), name,
              " must have at most 2^30 entries in its last dimension, got ", t.size(d));
      table.width = static_cast<int32_t>(t.size(d));
    }
  }
  if (!fits || d != t.dim()) {
    std::ostringstream wanted;
    for (char const* axis = axes; *axis != 0; ++axis) {
      char const letter = static_cast<char>(*axis & ~0x20);
      wanted << (axis == axes ? "[" : ", ");
      if (letter == 'N') {
        wanted << "any";
      } else {
        wanted << (letter == 'B'   ? problem.batch
                   : letter == 'Q' ? problem.grid_q[kGridAxes - 1]
                                   : problem.heads_kv)
               << (*axis != letter ? " or 1" : "");
      }
    }
    require(false, name, " must have shape ", wanted.str(), "], got ", shape_of(t));
  }
  table.data = static_cast<int32_t const*>(t.data_ptr());
  return table;
}

// A form whose tensors are both given or both missing.
bool is_given(char const* first, bool has_first, char const* second, bool has_second) {
  require(has_first == has_second, has_first ? second : first, " must be given with ",
          has_first ? first : second, ", got only the latter");
  return has_first;
}

void add_lists(DecodeKeys& keys, DecodeArguments const& a, FmhaProblem const& problem,
               Tensor const& q) {
  bool const spans = is_given("head_starts", a.head_starts.has_value(), "head_lengths",
                              a.head_lengths.has_value());
  bool const blocks = is_given("block_indices", a.block_indices.has_value(), "block_counts",
                               a.block_counts.has_value());
  require(a.token_indices || !a.token_counts,
          "token_indices must be given with token_counts, got only the latter");
  require(spans + blocks + a.token_indices.has_value() <= 1,
          "at most one of block_indices, token_indices and head_starts must be given, got more");
  if (spans) {
    keys.starts = table_of("head_starts", *a.head_starts, "BH", problem, q);
    keys.span_lengths = table_of("head_lengths", *a.head_lengths, "BH", problem, q);
  } else if (blocks) {
    require(a.block == 16 || a.block == 32 || a.block == 64 || a.block == 128,
            "block must be 16, 32, 64 or 128, got ", a.block);
    keys.form = DecodeKeys::Form::kBlocks;
    keys.block = static_cast<int32_t>(a.block);
    keys.entries = table_of("block_indices", *a.block_indices, "BhN", problem, q);
    keys.counts = table_of("block_counts", *a.block_counts, "Bh", problem, q);
    require(int64_t{keys.entries.width} * a.block <= (1 << 30),
            "block_indices must have lists of at most 2^30 keys, got ", keys.entries.width,
            " blocks");
  } else if (a.token_indices) {
    keys.form = DecodeKeys::Form::kTokens;
    keys.entries = table_of("token_indices", *a.token_indices, "BqhN", problem, q);
    keys.by_query = a.token_indices->size(1) > 1;
    if (a.token_counts) {
      keys.counts = table_of("token_counts", *a.token_counts, "Bqh", problem, q);
      keys.by_query |= a.token_counts->size(1) > 1;
    }
  }
}

// Cache rows that a request can have.
void add_capacity(DecodeKeys& keys, DecodeArguments const& a, FmhaProblem const& problem,
                  Tensor const& q, Tensor const& k_cache) {
  int64_t rows = k_cache.size(1);
  if (a.page_table) {
    bool const by_head = a.page_table->dim() == 3;
    keys.page_table = table_of("page_table", *a.page_table, by_head ? "BHN" : "BN", problem, q);
    keys.page = static_cast<int32_t>(std::max<int64_t>(rows, 1));
    keys.pages = static_cast<int32_t>(k_cache.size(0));
    rows *= keys.page_table.width;
  }
  keys.capacity = static_cast<int32_t>(std::min<int64_t>(rows, INT32_MAX));
}

}  // namespace

DecodeKeys decode_keys(DecodeArguments const& a, FmhaProblem const& problem, Tensor const& q,
                       Tensor const& k_cache) {
  DecodeKeys keys;
  keys.len_q = problem.grid_q[kGridAxes - 1];
  keys.group = problem.heads_kv == 0 ? 0 : problem.heads_q / problem.heads_kv;
  keys.lengths = table_of("seq_lens", a.seq_lens, a.seq_lens.dim() == 2 ? "BH" : "B", problem, q);
  add_capacity(keys, a, problem, q, k_cache);
  add_lists(keys, a, problem, q);
  keys.causal = a.causal;
  if (a.window) {
    require(*a.window >= 1, "window must be at least 1 or None, got ", *a.window);
    keys.window = static_cast<int32_t>(std::min<int64_t>(*a.window, INT32_MAX));
  }
  if (a.tree_mask) {
    require(a.causal && !a.window,
            "tree_mask must be given with causal=True and without window, got one of them");
    keys.tree = table_of("tree_mask", *a.tree_mask, "BQN", problem, q);
    require(keys.tree.width == ceil_div(keys.len_q, 32), "tree_mask must have ",
            ceil_div(keys.len_q, 32), " words of 32 new keys for a query, got ", keys.tree.width);
  }
  if (a.sink) {
    check_dtype("sink", *a.sink, ScalarType::Float, q);
    require(a.sink->dim() == 1 && a.sink->size(0) == problem.heads_q, "sink must have shape [",
            problem.heads_q, "], one for each query head, got ", shape_of(*a.sink));
    keys.sink = static_cast<float const*>(a.sink->data_ptr());
    keys.sink_stride = a.sink->stride(0);
  }
  if (!a.split_tokens && !on_cpu(q)) {
    return keys;  // GPUs cut by the number of multiprocessors
  }
  int64_t const split = a.split_tokens.value_or(kDefaultSplit);
  require(split >= DecodeKeys::kTile && split % DecodeKeys::kTile == 0,
          "split_tokens must be a multiple of ", DecodeKeys::kTile, ", at least that, got ", split);
  keys.split = static_cast<int32_t>(std::min<int64_t>(split, 1 << 30));
  return keys;
}

}  // namespace sparse_fmha
