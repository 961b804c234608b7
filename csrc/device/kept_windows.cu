#include "sparse_fmha/device/kept_windows.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "sparse_fmha/device/allocate.h"
#include "sparse_fmha/device/warp_rows.h"
#include "sparse_fmha/device/window_lists.h"
#include "sparse_fmha/planning/skip_bits.h"

namespace sparse_fmha::device {
namespace {

constexpr int64_t kMaxKeys = 1 << 30;  // of lists
constexpr int kPieceElements = 8;      // of 16 bits, copied together

// Copies between rows of a tensor of the user's and rows that are contiguous.
struct RowCopies {
  TensorView tensor;  // strides in pieces
  Coord grid;
  int32_t const* tokens;  // of each row; nullptr: row i is token i
  uint4* rows;            // [batch, all_rows, heads, pieces], the first of these
  int64_t all_rows;
  int32_t num_rows;
  int32_t batch;
  int32_t heads;
  int32_t pieces;
};

struct PiecePlace {
  uint4* of_tensor;  // nullptr: no such token
  uint4* of_rows;    // nullptr: nothing to do
};

__device__ PiecePlace piece_place(RowCopies const& c) {
  int64_t rest = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  auto const piece = static_cast<int32_t>(rest % c.pieces);
  rest /= c.pieces;
  auto const head = static_cast<int32_t>(rest % c.heads);
  rest /= c.heads;
  auto const row = static_cast<int32_t>(rest % c.num_rows);
  int64_t const batch = rest / c.num_rows;
  if (batch >= c.batch) {
    return {nullptr, nullptr};
  }
  uint4* const of_rows =
      c.rows + ((batch * c.all_rows + row) * c.heads + head) * int64_t{c.pieces} + piece;
  int32_t token = c.tokens == nullptr ? row : c.tokens[row];
  if (token < 0) {
    return {nullptr, of_rows};
  }
  int64_t at = batch * c.tensor.batch_stride + head * c.tensor.head_stride + piece;
  for (int axis = kGridAxes - 1; axis >= 0; --axis) {
    at += token % c.grid[axis] * c.tensor.axis_stride[axis];
    token /= c.grid[axis];
  }
  return {static_cast<uint4*>(c.tensor.data) + at, of_rows};
}

__global__ void __launch_bounds__(kRowThreads) gather_rows(RowCopies const copies) {
  PiecePlace const place = piece_place(copies);
  if (place.of_rows != nullptr) {
    *place.of_rows = place.of_tensor == nullptr ? uint4{0, 0, 0, 0} : *place.of_tensor;
  }
}
__global__ void __launch_bounds__(kRowThreads) scatter_rows(RowCopies const copies) {
  PiecePlace const place = piece_place(copies);
  if (place.of_tensor != nullptr) {
    *place.of_tensor = *place.of_rows;
  }
}

class Copier {
 public:
  Copier(FmhaProblem const& p, ExecutionContext const& context)
      : batch_(p.batch), context_(context), stream_(static_cast<cudaStream_t>(context.stream)) {}

  template <class T>
  T* allocate(int64_t number) const {
    return device::allocate<T>(context_, number);
  }
  template <class T>
  T* zeros(int64_t number) const {
    T* const to = allocate<T>(number);
    check_cuda(cudaMemsetAsync(to, 0, static_cast<size_t>(number) * sizeof(T), stream_),
               "clearing the bits of tiles");
    return to;
  }
  // A tensor [batch, rows, heads, dim] of 16-bit elements.
  TensorView tensor(int64_t rows, int32_t heads, int32_t dim) const {
    return sequence(allocate<uint16_t>(batch_ * rows * heads * dim), rows, heads, dim);
  }
  static TensorView sequence(void* data, int64_t rows, int32_t heads, int32_t dim) {
    int64_t const row = int64_t{heads} * dim;
    return {data, rows * row, {0, 0, row}, dim};
  }
  // Rows [first, first + number) of `rows`, and tokens of `tensor`.
  RowCopies copies(TensorView const& tensor, Coord const& grid, int32_t const* tokens,
                   TensorView const& rows, int64_t first, int32_t number, int32_t heads,
                   int32_t dim) const {
    RowCopies copies = {tensor,
                        grid,
                        tokens,
                        nullptr,
                        0,
                        number,
                        static_cast<int32_t>(batch_),
                        heads,
                        dim / kPieceElements};
    copies.tensor.batch_stride /= kPieceElements;
    copies.tensor.head_stride /= kPieceElements;
    for (int axis = 0; axis < kGridAxes; ++axis) {
      copies.tensor.axis_stride[axis] /= kPieceElements;
    }
    int64_t const row = int64_t{heads} * dim;
    copies.all_rows = rows.batch_stride / row;
    copies.rows = reinterpret_cast<uint4*>(static_cast<uint16_t*>(rows.data) + first * row);
    return copies;
  }
  void gather(RowCopies const& copies) const {
    gather_rows<<<blocks(copies), kRowThreads, 0, stream_>>>(copies);
    check_cuda(cudaGetLastError(), "launching the copy of rows");
  }
  void scatter(RowCopies const& copies) const {
    scatter_rows<<<blocks(copies), kRowThreads, 0, stream_>>>(copies);
    check_cuda(cudaGetLastError(), "launching the copy of gradients");
  }
  cudaStream_t stream() const { return stream_; }

 private:
  static unsigned blocks(RowCopies const& c) {
    int64_t const pieces = int64_t{c.batch} * c.num_rows * c.heads * c.pieces;
    return grid_size((pieces + kRowThreads - 1) / kRowThreads, "the rows to copy");
  }
  int64_t const batch_;
  ExecutionContext const& context_;
  cudaStream_t const stream_;
};

std::vector<InterleavedGrid> grids_of(FmhaProblem const& p, KernelInfo const& forward) {
  return interleaved_grids(std::get<Neighborhood::Params>(p.sparsity), forward.tile_q,
                           forward.tile_k, forward.key.head_dim);
}

// Numbers of an interleaved grid's keys.
int64_t keys_of(InterleavedGrid const& grid) {
  return volume(grid.shape.k) * Neighborhood::num_key_tiles(grid.params, grid.shape);
}

// Whether rows in the order of groups and keys in that of boxes are the tokens in order.
bool are_in_order(FmhaProblem const& p) {
  auto const& windows = std::get<Neighborhood::Params>(p.sparsity);
  int32_t const tokens = p.grid_q[kGridAxes - 1];
  return volume(p.grid_q) == tokens && tokens % 128 == 0 && volume(windows.dilation) == 1 &&
         p.extra_len == 0;
}

// The keys of the grid and the extra tokens, and their rows.
template <class Body>
void for_keys(Copier const& copier, FmhaProblem const& p, WindowTokens const& tokens,
              TensorView const& tensor, TensorView const& extra, TensorView const& rows,
              int32_t dim, Body const& body) {
  body(copier.copies(tensor, p.grid_kv, tokens.of_keys, rows, 0, tokens.keys, p.heads_kv, dim));
  if (p.extra_len > 0) {
    body(copier.copies(extra, {1, 1, p.extra_len}, nullptr, rows, tokens.keys, p.extra_len,
                       p.heads_kv, dim));
  }
}

}  // namespace

KeptWindows copy_kept_windows(FmhaProblem const& p, KernelInfo const& forward,
                              ExecutionContext const& context) {
  Copier const copier(p, context);
  auto const grids = grids_of(p, forward);
  SkipSizes const sizes = skip_sizes(p, forward.tile_k, forward.key.head_dim);
  int64_t of_grids = 0;
  WindowLists params = {};
  for (InterleavedGrid const& grid : grids) {
    of_grids += keys_of(grid);
    params.width = std::max(params.width, most_blocks(grid, p.extra_len));
  }
  if (of_grids + p.extra_len > kMaxKeys) {
    throw std::runtime_error(
        "sparse_fmha: gradients of neighborhoods with skip_threshold take at most 2^30 keys in key "
        "tiles, got " +
        std::to_string(of_grids + p.extra_len) + "; call without skip_threshold");
  }
  auto const keys = static_cast<int32_t>(of_grids + p.extra_len);
  int32_t const queries = 64 * sizes.groups;
  int64_t const rows = int64_t{p.batch} * p.heads_q * sizes.groups;
  params.extra_key = static_cast<int32_t>(of_grids);
  params.extra_len = p.extra_len;
  params.tile_k = forward.tile_k;
  params.all_groups = sizes.groups;
  params.lists = p.batch * p.heads_q;
  params.skipped = p.skip_bits;
  params.skip_words = sizes.words;
  params.keys = copier.zeros<uint32_t>(rows * params.width);
  params.full_counts = copier.allocate<int32_t>(rows);
  params.full = copier.allocate<int32_t>(rows * params.width);
  params.counts = copier.allocate<int32_t>(rows);
  params.indices = copier.allocate<int32_t>(rows * params.width);
  params.bits = copier.allocate<uint32_t>(rows * params.width * 64);
  auto* const row_tokens = copier.allocate<int32_t>(queries);
  auto* const key_tokens = copier.allocate<int32_t>(params.extra_key);
  for (InterleavedGrid const& grid : grids) {
    params.grid = grid;
    find_tokens(grid, p.grid_q, row_tokens + int64_t{64} * grid.first_group,
                key_tokens + params.first_key, copier.stream());
    list_windows(params, copier.stream());
    params.first_key += static_cast<int32_t>(keys_of(grid));
  }

  KeptWindows windows = {p, *p.gradients, {row_tokens, key_tokens, params.extra_key}};
  FmhaProblem& lists = windows.problem;
  lists.grid_q = {1, 1, queries};
  lists.grid_kv = {1, 1, keys};
  lists.extra_len = 0;
  lists.extra_k = lists.extra_v = {};
  lists.skip_threshold = nullptr;
  lists.skip_counts = nullptr;
  lists.skip_bits = nullptr;
  BlockSparse::Params sparsity = {};
  sparsity.len_q = queries;
  sparsity.len_kv = keys;
  sparsity.block_q = 64;
  sparsity.block_kv = kWindowBlock;
  sparsity.full = {params.full_counts, params.full, params.width};
  sparsity.partial = {params.counts, params.indices, params.width};
  sparsity.bits = reinterpret_cast<uint8_t const*>(params.bits);
  sparsity.head_stride = sizes.groups;
  sparsity.batch_stride = sparsity.head_stride * p.heads_q;
  lists.sparsity = sparsity;
  if (are_in_order(p)) {
    windows.tokens = {};
    return windows;
  }

  Gradients& g = windows.gradients;
  lists.q = copier.tensor(queries, p.heads_q, p.head_dim);
  copier.gather(
      copier.copies(p.q, p.grid_q, row_tokens, lists.q, 0, queries, p.heads_q, p.head_dim));
  g.out = copier.tensor(queries, p.heads_q, p.value_dim);
  copier.gather(copier.copies(p.gradients->out, p.grid_q, row_tokens, g.out, 0, queries, p.heads_q,
                              p.value_dim));
  auto gather = [&](RowCopies const& copies) { copier.gather(copies); };
  lists.k = copier.tensor(keys, p.heads_kv, p.head_dim);
  for_keys(copier, p, windows.tokens, p.k, p.extra_k, lists.k, p.head_dim, gather);
  lists.v = copier.tensor(keys, p.heads_kv, p.value_dim);
  for_keys(copier, p, windows.tokens, p.v, p.extra_v, lists.v, p.value_dim, gather);
  // A row of terms is a piece, as if it had eight elements.
  TensorView terms = {p.gradients->row_terms, 0, {}, kPieceElements};
  int64_t stride = int64_t{kPieceElements} * p.heads_q;
  for (int axis = kGridAxes - 1; axis >= 0; --axis) {
    terms.axis_stride[axis] = stride;
    stride *= p.grid_q[axis];
  }
  terms.batch_stride = stride;
  TensorView const of_rows = copier.tensor(queries, p.heads_q, kPieceElements);
  copier.gather(
      copier.copies(terms, p.grid_q, row_tokens, of_rows, 0, queries, p.heads_q, kPieceElements));
  g.row_terms = static_cast<float*>(of_rows.data);
  g.extra_k = g.extra_v = {};
  if (g.q.data != nullptr) {
    g.q = copier.tensor(queries, p.heads_q, p.head_dim);
  }
  if (g.k.data != nullptr) {
    g.k = copier.tensor(keys, p.heads_kv, p.head_dim);
    g.v = copier.tensor(keys, p.heads_kv, p.value_dim);
  }
  return windows;
}

void return_gradients(FmhaProblem const& p, KeptWindows const& windows,
                      ExecutionContext const& context) {
  if (windows.tokens.of_rows == nullptr) {
    return;
  }
  Copier const copier(p, context);
  Gradients const& to = *p.gradients;
  Gradients const& from = windows.gradients;
  if (to.q.data != nullptr) {
    copier.scatter(copier.copies(to.q, p.grid_q, windows.tokens.of_rows, from.q, 0,
                                 windows.problem.grid_q[kGridAxes - 1], p.heads_q, p.head_dim));
  }
  if (to.k.data != nullptr) {
    auto scatter = [&](RowCopies const& copies) { copier.scatter(copies); };
    for_keys(copier, p, windows.tokens, to.k, to.extra_k, from.k, p.head_dim, scatter);
    for_keys(copier, p, windows.tokens, to.v, to.extra_v, from.v, p.value_dim, scatter);
  }
}

}  // namespace sparse_fmha::device
