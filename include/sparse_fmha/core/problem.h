// The problem as plain data, the input of every CPU and GPU kernel.
#pragma once

#include <cstdint>
#include <variant>

#include "sparse_fmha/core/config.h"
#include "sparse_fmha/mechanisms/block_sparse.h"
#include "sparse_fmha/mechanisms/dense.h"
#include "sparse_fmha/mechanisms/neighborhood.h"
#include "sparse_fmha/mechanisms/stripe.h"

namespace sparse_fmha {

enum class DataType : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

// A [B, T, Y, X, H, D] tensor. Strides are in elements; D has stride 1. An axis missing from the
// user's tensor has extent 1 and stride 0.
struct TensorView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t axis_stride[kGridAxes] = {0, 0, 0};
  int64_t head_stride = 0;
};

// fp32 numbers of each (batch entry, query head, token), tokens in row-major order. A stride of 0
// shares them among batch entries or heads. data is nullptr if there are none.
struct TokenNumbers {
  float const* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
};

template <class... M>
struct MechanismList {
  using Sparsity = std::variant<typename M::Params...>;
  static constexpr char const* kNames[] = {M::kName...};
};
// All mechanisms; a mechanism's index in this list is its registry key.
using Mechanisms = MechanismList<Dense, Causal, Neighborhood, BlockSparse, Stripe>;

// The parameters of one mechanism.
using Sparsity = Mechanisms::Sparsity;

template <class Mechanism, int Index = 0>
constexpr int mechanism_index() {
  static_assert(Index < std::variant_size_v<Sparsity>, "the list has no such mechanism");
  using Alternative = std::variant_alternative_t<Index, Sparsity>;
  if constexpr (std::is_same_v<typename Mechanism::Params, Alternative>) {
    return Index;
  } else {
    return mechanism_index<Mechanism, Index + 1>();
  }
}

struct DecodeKeys;    // decode.h
struct PackedTokens;  // packed.h

// Tensors that the backward kernels read and write, besides those of the forward pass. A tensor
// whose data is nullptr is not wanted.
struct Gradients {
  TensorView out;               // gradient of out, [B, grid_q, heads_q, Dv]
  float const* lse = nullptr;   // gradient of lse, [B, grid_q, heads_q], contiguous; nullptr: zero
  TensorView q, k, v;           // written, contiguous
  TensorView extra_k, extra_v;  // written, contiguous
  float* key_bias = nullptr;    // written, [B, heads_q, grid_kv], contiguous
  // Per query row: lse in log2 units (+inf if the row sees no key), and delta =
  // sum(out * gradient of out) - gradient of lse. [B, grid_q, heads_q, 4], 16 bytes a row. On a GPU
  // two more numbers follow (sm90/backward/row_terms.h); on the CPU all lse come first, then all
  // delta, in the compute type.
  float* row_terms = nullptr;
  // Of problems with a threshold: the tiles that the forward pass skipped, which are filled in with
  // the row terms, in the CPU's format (cpu/backward/plan.h).
  void* skipped_tiles = nullptr;
};

struct FmhaProblem {
  DataType dtype = DataType::kFloat32;
  int32_t batch = 0;
  int32_t heads_q = 0;  // a multiple of heads_kv
  int32_t heads_kv = 0;
  int32_t head_dim = 0;   // of q and k: a multiple of 8, at most 256
  int32_t value_dim = 0;  // of v and out, in the same range
  Coord grid_q = {};      // tokens per axis; a sequence is {1, 1, Lq}
  Coord grid_kv = {};
  TensorView q;           // [B, grid_q, heads_q, D]
  TensorView k;           // [B, grid_kv, heads_kv, D]
  TensorView v;           // [B, grid_kv, heads_kv, Dv]
  TensorView out;         // [B, grid_q, heads_q, Dv], contiguous
  float* lse = nullptr;   // [B, grid_q, heads_q], contiguous, natural log
  int32_t extra_len = 0;  // tokens that every query sees besides its neighborhood
  TensorView extra_k;     // [B, 1, 1, extra_len, heads_kv, D]; data may be nullptr
  TensorView extra_v;     // the same with Dv
  double scale = 1.0;     // of q.k, before the softmax
  // Scores are softcap * tanh(scale * q.k / softcap), before biases; 0: scale * q.k.
  double softcap = 0.0;
  // The bias is added to scale * q.k of the grid's keys, in natural units; -inf hides a key. A
  // query sees no key whose bias is below the query's threshold, which those of lists alone have.
  TokenNumbers key_bias;
  TokenNumbers row_threshold;
  // For kernels that skip key tiles, else nullptr:
  float const* skip_threshold = nullptr;  // [B]
  int64_t* skip_counts = nullptr;         // [B, heads_q, 2]: tiles visited, and tiles skipped
  // Zeros: a forward kernel sets the bit of a key tile where a group of 64 query rows skips it. [B,
  // heads_q, skip_groups(), skip_words()] (planning/skip_bits.h), the lowest bit first, from the
  // last tile of the group's walk to the first; or nullptr.
  uint32_t* skip_bits = nullptr;
  // For backward kernels, where the sparsity is lists of these: the blocks of kept tiles, in the
  // order of the keys; or nullptr. [B, heads_q, skip_groups(), 32 blocks to a word]
  uint32_t const* kept_blocks = nullptr;
  // For backward kernels, which read out and lse; else nullptr.
  Gradients const* gradients = nullptr;
  // For decode kernels, else nullptr. k and v are then a cache of batch entries or pages, grid_kv
  // the rows of one, and skip_counts is [B, heads_kv, 2].
  DecodeKeys const* decode = nullptr;
  // For kernels of packed sequences, which are Dense or Causal each; else nullptr. The batch is
  // then 1, and grid_q and grid_kv are the tokens of all of them, or the keys that their pages have
  // room for.
  PackedTokens const* packed = nullptr;
  Sparsity sparsity;
};

// Sizes of skip_bits of a sequence without lists, whose kernels have tiles of at least kSkipTile.
inline constexpr int32_t kSkipTile = 64;
inline int32_t skip_groups(FmhaProblem const& p) { return ceil_div(p.grid_q[kGridAxes - 1], 64); }
inline int32_t skip_words(FmhaProblem const& p) {
  return ceil_div(ceil_div(p.grid_kv[kGridAxes - 1], kSkipTile), 32);
}

}  // namespace sparse_fmha
