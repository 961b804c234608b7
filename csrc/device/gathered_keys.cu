#include "sparse_fmha/device/gathered_keys.h"

#include "sparse_fmha/device/allocate.h"
#include "sparse_fmha/device/gathered_rows.h"
#include "sparse_fmha/device/warp_rows.h"

namespace sparse_fmha::device {
namespace {

constexpr int kPieceElements = 8;  // of 16 bits, copied together
constexpr uint4 kZeros = {0, 0, 0, 0};

// Two tensors of one layout: keys and values.
struct Rows {
  TensorView from;  // of the user, at the part
  uint4* to;        // [batch, heads of copies, keys, pieces]
  int32_t pieces;
};
struct Gather {
  Rows of[2];
  ListRows lists;
  int32_t const* tokens;
  int32_t const* counts;
  int32_t capacity;
  int32_t heads;  // of copies
};

// A thread block copies a block of keys and values; places behind the last key become zeros.
__global__ void __launch_bounds__(kRowThreads) gather_blocks(Gather const p) {
  int32_t const blocks = p.capacity / kGatheredBlock;
  int64_t rest = blockIdx.x;
  auto const block = static_cast<int32_t>(rest % blocks);
  rest /= blocks;
  auto const group = static_cast<int32_t>(rest % p.lists.groups);
  rest /= p.lists.groups;
  auto const head = static_cast<int32_t>(rest % p.heads);
  auto const batch = static_cast<int32_t>(rest / p.heads);
  int64_t const row = p.lists.first(batch, head) + group;
  int32_t const first = block * kGatheredBlock;
  if (first >= p.counts[row]) {
    return;  // no query sees it
  }
  int32_t const* const tokens = p.tokens + row * p.capacity + first;
  int64_t const copy =
      ((int64_t{batch} * p.heads + head) * p.lists.groups + group) * p.capacity + first;
#pragma unroll
  for (Rows const& rows : p.of) {
    auto const* const from = static_cast<uint16_t const*>(rows.from.data) +
                             batch * rows.from.batch_stride +
                             head / p.lists.copies * rows.from.head_stride;
    int32_t const all = kGatheredBlock * rows.pieces;
#pragma unroll 4
    for (auto i = static_cast<int32_t>(threadIdx.x); i < all; i += kRowThreads) {
      int32_t const token = tokens[i / rows.pieces];
      auto const* const at =
          from + token * rows.from.axis_stride[kGridAxes - 1] + i % rows.pieces * kPieceElements;
      rows.to[copy * rows.pieces + i] =
          token == kNoToken ? kZeros : __ldg(reinterpret_cast<uint4 const*>(at));
    }
  }
}

// Copies some heads of rows.
struct HeadCopies {
  uint4 const* from;
  uint4* to;
  int64_t rows;
  int32_t pieces;       // of a row's heads
  int64_t from_stride;  // in pieces
  int64_t to_stride;
};
__global__ void __launch_bounds__(kRowThreads) copy_heads(HeadCopies const p) {
  int64_t const index = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  int64_t const row = index / p.pieces;
  int64_t const piece = index % p.pieces;
  if (row < p.rows) {
    p.to[row * p.to_stride + piece] = p.from[row * p.from_stride + piece];
  }
}
void launch_copy(HeadCopies const& copies, ExecutionContext const& context) {
  int64_t const blocks = (copies.rows * copies.pieces + kRowThreads - 1) / kRowThreads;
  copy_heads<<<grid_size(blocks, "the heads of rows"), kRowThreads, 0,
               static_cast<cudaStream_t>(context.stream)>>>(copies);
  check_cuda(cudaGetLastError(), "launching the copy of heads");
}

int32_t heads_per_kv(FmhaProblem const& p) { return p.heads_q / p.heads_kv; }
int64_t len_q(FmhaProblem const& p) { return p.grid_q[kGridAxes - 1]; }

}  // namespace

GatheredKeys gather_keys(FmhaProblem const& p, ListedKeys const& keys, GatheredPart const& part,
                         ExecutionContext const& context) {
  int32_t const heads_q = part.heads * heads_per_kv(p);
  int32_t const first_q = part.first_head * heads_per_kv(p);
  int32_t const heads = part.heads * copies_of_head(p);
  int64_t const len = keys.blocks.len_kv;
  GatheredKeys found = {p, *p.gradients};
  FmhaProblem& lists = found.problem;
  Gradients& g = found.gradients;
  lists.batch = part.batch;
  lists.heads_q = heads_q;
  lists.heads_kv = heads;
  lists.grid_kv = {1, 1, keys.blocks.len_kv};
  lists.sparsity = BlockSparse::for_head(keys.blocks, part.first_batch, first_q);
  lists.q = view_at(p.q, part.first_batch, first_q);
  g.out = view_at(g.out, part.first_batch, first_q);
  g.q = view_at(g.q, part.first_batch, first_q);
  int64_t const rows = part.batch * len_q(p);
  g.row_terms += (part.first_batch * len_q(p) * p.heads_q + first_q) * 4;
  if (heads_q < p.heads_q) {  // kernels read and write all heads of a row
    auto* const terms = allocate<float>(context, rows * heads_q * 4);
    launch_copy({reinterpret_cast<uint4 const*>(g.row_terms), reinterpret_cast<uint4*>(terms), rows,
                 heads_q, p.heads_q, heads_q},
                context);
    g.row_terms = terms;
    if (g.q.data != nullptr) {
      int64_t const row = int64_t{heads_q} * p.head_dim;
      g.q = {allocate<uint16_t>(context, rows * row), len_q(p) * row, {0, 0, row}, p.head_dim};
    }
  }
  auto copies = [&](int32_t dim) -> TensorView {
    int64_t const head = len * dim;
    return {
        allocate<uint16_t>(context, part.batch * heads * head), heads * head, {0, 0, dim}, head};
  };
  lists.k = copies(p.head_dim);
  lists.v = copies(p.value_dim);
  g.k = copies(p.head_dim);
  g.v = copies(p.value_dim);
  auto of = [&](TensorView const& from, TensorView const& to, int32_t dim) -> Rows {
    return {view_at(from, part.first_batch, part.first_head), static_cast<uint4*>(to.data),
            dim / kPieceElements};
  };
  Gather const gather = {{of(p.k, lists.k, p.head_dim), of(p.v, lists.v, p.value_dim)},
                         list_rows(p, part),
                         keys.tokens,
                         keys.counts,
                         keys.capacity,
                         heads};
  int64_t const blocks = int64_t{part.batch} * heads * (len / kGatheredBlock);
  gather_blocks<<<grid_size(blocks, "the blocks of listed keys"), kRowThreads, 0,
                  static_cast<cudaStream_t>(context.stream)>>>(gather);
  check_cuda(cudaGetLastError(), "launching the copy of listed keys");
  gather_biases(p, keys, part, found, context);
  return found;
}

void return_queries(FmhaProblem const& p, GatheredPart const& part, GatheredKeys const& gathered,
                    ExecutionContext const& context) {
  Gradients const& to = *p.gradients;
  int32_t const heads_q = gathered.problem.heads_q;
  if (to.q.data != nullptr && heads_q < p.heads_q) {
    TensorView const dq =
        view_at(to.q, part.first_batch, int64_t{part.first_head} * heads_per_kv(p));
    int32_t const pieces = p.head_dim / kPieceElements;
    launch_copy({static_cast<uint4 const*>(gathered.gradients.q.data), static_cast<uint4*>(dq.data),
                 part.batch * len_q(p), heads_q * pieces, int64_t{heads_q} * pieces,
                 int64_t{p.heads_q} * pieces},
                context);
  }
}

}  // namespace sparse_fmha::device
