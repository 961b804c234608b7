#include "sparse_fmha/device/kept_windows.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "sparse_fmha/device/allocate.h"
#include "sparse_fmha/device/warp_rows.h"
#include "sparse_fmha/planning/kept_windows.h"
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

// The groups of one interleaved grid.
struct WindowParams {
  InterleavedGrid grid;
  Coord whole;
  int32_t extra_len;
  int32_t tile_k;
  int32_t all_groups;
  int32_t lists;  // batch entries and heads
  uint32_t const* skipped;
  int32_t skip_words;
  uint32_t* keys;  // [lists, all_groups, key_words]: kept ones
  int32_t key_words;
  int32_t width;
  int32_t* full_counts;  // [lists, all_groups]
  int32_t* full;         // [lists, all_groups, width]
  int32_t* counts;       // the same of partial blocks
  int32_t* indices;
  uint32_t* bits;  // [lists, all_groups, width, 64]
};

__global__ void __launch_bounds__(kRowThreads)
    find_tokens(InterleavedGrid const grid, Coord const whole, int32_t* tokens) {
  int64_t const index = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  auto const group = static_cast<int32_t>(index / 64);
  if (group < grid.groups) {
    WindowGroup const at = window_group(grid, group);
    Coord const position = at.position(grid, static_cast<int32_t>(index % 64));
    tokens[64 * int64_t{grid.first_group} + index] =
        token_at(grid, whole, at.tile.residue, position);
  }
}

// The group of a warp, and the number of its row in all lists.
struct WarpGroup {
  int32_t group;
  int64_t row;
  bool there;
  __device__ explicit WarpGroup(WindowParams const& p) {
    int64_t const index = row_of_warp();
    group = static_cast<int32_t>(index % p.grid.groups);
    row = index / p.grid.groups * p.all_groups + p.grid.first_group + group;
    there = index < int64_t{p.grid.groups} * p.lists;
  }
};

// Sets the bits of the lanes' keys; negative: none. Lanes beside each other whose bits are in one
// word leave it to the last one of them. Keys of a call are all different.
__device__ __forceinline__ void set_bits(uint32_t* words, int32_t key) {
  auto const lane = static_cast<int32_t>(threadIdx.x % kWarp);
  int32_t const word = key < 0 ? -1 : key / 32;
  uint32_t const bit = key < 0 ? 0 : 1u << key % 32;
  uint32_t sum = bit;  // over this lane and those before it, modulo 2^32
  for (int32_t distance = 1; distance < kWarp; distance *= 2) {
    uint32_t const added = __shfl_up_sync(kAllLanes, sum, distance);
    sum += lane >= distance ? added : 0;
  }
  int32_t const word_before = __shfl_up_sync(kAllLanes, word, 1);
  bool const first = lane == 0 || word_before != word;
  uint32_t const firsts = __ballot_sync(kAllLanes, first);
  int32_t const mine = 31 - __clz(static_cast<int32_t>(firsts & (0xffffffffu >> (31 - lane))));
  uint32_t const before = __shfl_sync(kAllLanes, sum - bit, mine);
  bool const last = lane == kWarp - 1 || (firsts >> (lane + 1) & 1) != 0;
  if (last && word >= 0) {
    atomicOr(&words[word], sum - before);
  }
}

// Marks the keys in the tiles that each group kept.
__global__ void __launch_bounds__(kRowThreads) mark_keys(WindowParams const p) {
  WarpGroup const warp(p);
  if (!warp.there) {
    return;
  }
  QueryTile const tile = window_group(p.grid, warp.group).tile;
  WindowTiles const tiles = {Neighborhood::walk(p.grid.params, p.grid.shape, tile), p.extra_len,
                             p.tile_k};
  uint32_t const* const skipped = p.skipped + warp.row * p.skip_words;
  uint32_t* const keys = p.keys + warp.row * p.key_words;
  for (int32_t i = 0; i < tiles.total(); ++i) {
    int32_t const bit = tiles.total() - 1 - i;
    if ((skipped[bit / 32] >> bit % 32 & 1) != 0) {
      continue;
    }
    for (int32_t j = 0; j < p.tile_k; j += kWarp) {
      auto const mine = j + static_cast<int32_t>(threadIdx.x % kWarp);
      set_bits(keys, mine < p.tile_k ? key_of(p.grid, p.whole, tiles, tile.residue, i, mine) : -1);
    }
  }
}

// Which keys of a block the lane's rows of a group see: of the first 32 rows, and of the others.
struct SeenKeys {
  uint32_t of[2];
};

// Lists the blocks in which a row of a group sees a key that is marked, and which row sees which
// where not all see all.
class BlockLister {
 public:
  __device__ BlockLister(WindowParams const& p, WarpGroup const& warp,
                         Neighborhood::Row (&rows)[64])
      : p_(p), row_(warp.row), lane_(static_cast<int32_t>(threadIdx.x % kWarp)), rows_(rows) {
    WindowGroup const group = window_group(p.grid, warp.group);
    rows[lane_] = window_of(p.grid, group, lane_);
    rows[lane_ + kWarp] = window_of(p.grid, group, lane_ + kWarp);
    __syncwarp();
    common_ = common_window(rows[0], rows[63]);
  }

  __device__ void list() {
    uint32_t const* const keys = p_.keys + row_ * p_.key_words;
    for (int32_t first = 0; first < p_.key_words; first += kWarp) {
      uint32_t const mine = first + lane_ < p_.key_words ? keys[first + lane_] : 0;
      for (uint32_t left = __ballot_sync(kAllLanes, mine != 0); left != 0; left &= left - 1) {
        int32_t const from = __ffs(static_cast<int32_t>(left)) - 1;
        append(first + from, __shfl_sync(kAllLanes, mine, from));
      }
    }
    if (lane_ == 0) {
      p_.full_counts[row_] = full_;
      p_.counts[row_] = partial_;
    }
  }

 private:
  __device__ void append(int32_t block, uint32_t kept) {
    auto const tokens = static_cast<int32_t>(volume(p_.whole));
    int32_t const key = kWindowBlock * block + lane_;
    bool const mine = (kept >> lane_ & 1) != 0;
    bool const extra = key >= tokens;
    Coord const position = position_of(p_.grid, p_.whole, extra ? 0 : key);
    auto sees = [&](Neighborhood::Row const& window) {
      return mine &&
             (extra ? window.size[2] > 0 : Neighborhood::visible(p_.grid.params, window, position));
    };
    if (__all_sync(kAllLanes, !mine || sees(common_))) {
      if (kept == kAllLanes) {
        if (lane_ == 0) {
          p_.full[row_ * p_.width + full_] = block;
        }
        ++full_;
      } else {
        store(block, {kept, kept});
      }
      return;
    }
    SeenKeys seen = {0, 0};
    for (int32_t row = 0; row < 64; ++row) {
      uint32_t const bits = __ballot_sync(kAllLanes, sees(rows_[row]));
      if (row % kWarp == lane_) {
        (row < kWarp ? seen.of[0] : seen.of[1]) = bits;
      }
    }
    if (__any_sync(kAllLanes, (seen.of[0] | seen.of[1]) != 0)) {
      store(block, seen);
    }
  }
  __device__ void store(int32_t block, SeenKeys const& seen) {
    int64_t const place = row_ * p_.width + partial_;
    p_.bits[place * 64 + lane_] = seen.of[0];
    p_.bits[place * 64 + kWarp + lane_] = seen.of[1];
    if (lane_ == 0) {
      p_.indices[place] = block;
    }
    ++partial_;
  }

  WindowParams const& p_;
  int64_t const row_;
  int32_t const lane_;
  Neighborhood::Row const (&rows_)[64];
  Neighborhood::Row common_;
  int32_t full_ = 0;
  int32_t partial_ = 0;
};

__global__ void __launch_bounds__(kRowThreads) list_blocks(WindowParams const p) {
  __shared__ Neighborhood::Row windows[kRowWarps][64];
  WarpGroup const warp(p);
  if (warp.there) {
    BlockLister(p, warp, windows[threadIdx.x / kWarp]).list();
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

// The keys of the grid and the extra tokens, and their rows.
template <class Body>
void for_keys(Copier const& copier, FmhaProblem const& p, TensorView const& tensor,
              TensorView const& extra, TensorView const& rows, int32_t dim, Body const& body) {
  auto const tokens = static_cast<int32_t>(volume(p.grid_kv));
  body(copier.copies(tensor, p.grid_kv, nullptr, rows, 0, tokens, p.heads_kv, dim));
  if (p.extra_len > 0) {
    body(copier.copies(extra, {1, 1, p.extra_len}, nullptr, rows, tokens, p.extra_len, p.heads_kv,
                       dim));
  }
}

}  // namespace

KeptWindows copy_kept_windows(FmhaProblem const& p, KernelInfo const& forward,
                              ExecutionContext const& context) {
  Copier const copier(p, context);
  auto const grids = grids_of(p, forward);
  SkipSizes const sizes = skip_sizes(p, forward.tile_k, forward.key.head_dim);
  int64_t const all_keys = volume(p.grid_kv) + p.extra_len;
  if (all_keys > kMaxKeys) {
    throw std::runtime_error(
        "sparse_fmha: gradients of neighborhoods with skip_threshold take at most 2^30 keys, got " +
        std::to_string(all_keys) + "; call without skip_threshold");
  }
  auto const keys = static_cast<int32_t>(all_keys);
  int64_t const rows = int64_t{p.batch} * p.heads_q * sizes.groups;
  WindowParams params = {};
  params.whole = p.grid_q;
  params.extra_len = p.extra_len;
  params.tile_k = forward.tile_k;
  params.all_groups = sizes.groups;
  params.lists = p.batch * p.heads_q;
  params.skipped = p.skip_bits;
  params.skip_words = sizes.words;
  params.key_words = ceil_div(keys, kWindowBlock);
  params.keys = copier.zeros<uint32_t>(rows * params.key_words);
  for (InterleavedGrid const& grid : grids) {
    params.width = std::max(params.width, most_blocks(grid, p.grid_q, p.extra_len));
  }
  params.full_counts = copier.allocate<int32_t>(rows);
  params.full = copier.allocate<int32_t>(rows * params.width);
  params.counts = copier.allocate<int32_t>(rows);
  params.indices = copier.allocate<int32_t>(rows * params.width);
  params.bits = copier.allocate<uint32_t>(rows * params.width * 64);
  int32_t const queries = 64 * sizes.groups;
  auto* const tokens = copier.allocate<int32_t>(queries);
  for (InterleavedGrid const& grid : grids) {
    params.grid = grid;
    int64_t const threads = 64 * int64_t{grid.groups};
    find_tokens<<<grid_size((threads + kRowThreads - 1) / kRowThreads, "the query rows"),
                  kRowThreads, 0, copier.stream()>>>(grid, p.grid_q, tokens);
    int64_t const warps = int64_t{grid.groups} * params.lists;
    unsigned const blocks = row_blocks(warps, "the groups of 64 query rows");
    mark_keys<<<blocks, kRowThreads, 0, copier.stream()>>>(params);
    list_blocks<<<blocks, kRowThreads, 0, copier.stream()>>>(params);
    check_cuda(cudaGetLastError(), "launching the listing of what was kept");
  }

  KeptWindows windows = {p, *p.gradients, tokens};
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

  Gradients& g = windows.gradients;
  lists.q = copier.tensor(queries, p.heads_q, p.head_dim);
  copier.gather(copier.copies(p.q, p.grid_q, tokens, lists.q, 0, queries, p.heads_q, p.head_dim));
  g.out = copier.tensor(queries, p.heads_q, p.value_dim);
  copier.gather(
      copier.copies(p.gradients->out, p.grid_q, tokens, g.out, 0, queries, p.heads_q, p.value_dim));
  auto gather = [&](RowCopies const& copies) { copier.gather(copies); };
  lists.k = copier.tensor(keys, p.heads_kv, p.head_dim);
  for_keys(copier, p, p.k, p.extra_k, lists.k, p.head_dim, gather);
  lists.v = copier.tensor(keys, p.heads_kv, p.value_dim);
  for_keys(copier, p, p.v, p.extra_v, lists.v, p.value_dim, gather);
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
      copier.copies(terms, p.grid_q, tokens, of_rows, 0, queries, p.heads_q, kPieceElements));
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
  Copier const copier(p, context);
  Gradients const& to = *p.gradients;
  Gradients const& from = windows.gradients;
  if (to.q.data != nullptr) {
    copier.scatter(copier.copies(to.q, p.grid_q, windows.tokens, from.q, 0,
                                 windows.problem.grid_q[kGridAxes - 1], p.heads_q, p.head_dim));
  }
  if (to.k.data != nullptr) {
    auto scatter = [&](RowCopies const& copies) { copier.scatter(copies); };
    for_keys(copier, p, to.k, to.extra_k, from.k, p.head_dim, scatter);
    for_keys(copier, p, to.v, to.extra_v, from.v, p.value_dim, scatter);
  }
}

}  // namespace sparse_fmha::device
