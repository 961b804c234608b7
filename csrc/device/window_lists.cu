#include "sparse_fmha/device/window_lists.h"

#include "sparse_fmha/cuda/check.h"
#include "sparse_fmha/device/warp_rows.h"

namespace sparse_fmha::device {
namespace {

// Coordinates of a box of 64 rows, axis by axis: its sides are powers of two.
constexpr int kSides = 66;

__global__ void __launch_bounds__(kRowThreads)
    find_rows(InterleavedGrid const grid, Coord const whole, int32_t* tokens) {
  int64_t const index = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  auto const group = static_cast<int32_t>(index / 64);
  if (group < grid.groups) {
    WindowGroup const at = window_group(grid, group);
    Coord const offset = box_offset(at.sides, static_cast<int32_t>(index % 64));
    tokens[index] =
        token_at(grid, whole, at.tile.residue,
                 {at.origin[0] + offset[0], at.origin[1] + offset[1], at.origin[2] + offset[2]});
  }
}
__global__ void __launch_bounds__(kRowThreads)
    find_keys(InterleavedGrid const grid, Coord const whole, int32_t boxes, int32_t* tokens) {
  int64_t const index = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  int64_t const keys = volume(grid.shape.k);
  if (index < boxes * keys) {
    KeyTile const box =
        Neighborhood::key_tile(grid.params, grid.shape, static_cast<int32_t>(index / keys));
    Coord const offset = box_offset(grid.shape.k, static_cast<int32_t>(index % keys));
    tokens[index] =
        token_at(grid, whole, box.residue,
                 {box.origin[0] + offset[0], box.origin[1] + offset[1], box.origin[2] + offset[2]});
  }
}

// The group of a warp, and the number of its row in all lists.
struct WarpGroup {
  int32_t group;
  int64_t row;
  bool there;
  __device__ explicit WarpGroup(WindowLists const& p) {
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
__global__ void __launch_bounds__(kRowThreads) mark_keys(WindowLists const p) {
  WarpGroup const warp(p);
  if (!warp.there) {
    return;
  }
  QueryTile const tile = window_group(p.grid, warp.group).tile;
  WindowTiles const tiles = {Neighborhood::walk(p.grid.params, p.grid.shape, tile), p.extra_len,
                             p.tile_k};
  KeyBoxes const boxes(p.grid, p.first_key, tile);
  uint32_t const* const skipped = p.skipped + warp.row * p.skip_words;
  uint32_t* const keys = p.keys + warp.row * p.width;
  auto const lane = static_cast<int32_t>(threadIdx.x % kWarp);
  int32_t const extra_key = boxes.blocks() * kWindowBlock;
  for (int32_t first = 0; first < tiles.total(); first += kWarp) {
    // Locating a tile takes many instructions, so each lane locates one of the next 32.
    int32_t const i = first + lane;
    int32_t const bit = tiles.total() - 1 - i;
    bool const kept = bit >= 0 && (skipped[bit / 32] >> bit % 32 & 1) == 0;
    int32_t const extra = kept ? tiles.extra(i) : 0;
    Coord const origin = kept && extra < 0 ? tiles.box(i) : Coord{0, 0, 0};
    for (uint32_t left = __ballot_sync(kAllLanes, kept); left != 0; left &= left - 1) {
      int32_t const from = __ffs(static_cast<int32_t>(left)) - 1;
      auto of_tile = [&](int32_t x) { return __shfl_sync(kAllLanes, x, from); };
      int32_t const token = of_tile(extra);
      Coord const at = {of_tile(origin[0]), of_tile(origin[1]), of_tile(origin[2])};
      for (int32_t j = lane; j < p.tile_k; j += kWarp) {
        Coord const offset = boxes.offset(j);
        int32_t const of_grid =
            boxes.key({at[0] + offset[0], at[1] + offset[1], at[2] + offset[2]});
        int32_t const of_extra = token + j < p.extra_len ? extra_key + token + j : -1;
        set_bits(keys, token < 0 ? of_grid : of_extra);
      }
    }
  }
}

// Lists the blocks in which a row of a group sees a key that is marked, and which row sees which
// where not all see all. A warp has a group.
class BlockLister {
 public:
  __device__ BlockLister(WindowLists const& p, WarpGroup const& warp, Interval (&windows)[kSides])
      : p_(p),
        row_(warp.row),
        lane_(static_cast<int32_t>(threadIdx.x % kWarp)),
        group_(window_group(p.grid, warp.group)),
        boxes_(p.grid, p.first_key, group_.tile),
        windows_(windows) {
    Coord const& sides = group_.sides;
    int32_t first = 0;
#pragma unroll
    for (int axis = 0; axis < kGridAxes; ++axis) {
      for (int32_t i = lane_; i < sides[axis]; i += kWarp) {
        windows_[first + i] = window_at(p.grid, group_.tile.residue, axis, group_.origin[axis] + i);
      }
      first += sides[axis];
    }
    __syncwarp();
    // Edges of windows never move back.
    first = 0;
#pragma unroll
    for (int axis = 0; axis < kGridAxes; ++axis) {
      Interval const last = windows_[first + sides[axis] - 1];
      bool const there = last.end > 0;
      all_rows_ = all_rows_ && there;
      common_[axis] = {last.begin, there ? windows_[first].end : 0};
      first += sides[axis];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mine_[r] = box_offset(sides, lane_ + r * kWarp);
      exists_[r] = windows_[mine_[r][0]].end > 0 && windows_[sides[0] + mine_[r][1]].end > 0 &&
                   windows_[sides[0] + sides[1] + mine_[r][2]].end > 0;
    }
  }

  __device__ void list() {
    uint32_t const* const keys = p_.keys + row_ * p_.width;
    int32_t const own = boxes_.blocks();
    int32_t const blocks = own + ceil_div(p_.extra_len, kWindowBlock);
    for (int32_t first = 0; first < blocks; first += kWarp) {
      int32_t const block = first + lane_;
      uint32_t const kept = block < blocks ? keys[block] : 0;
      // A lane looks at a block, then the warp at each of those that need masks.
      int32_t const number =
          block < own ? boxes_.number(block) : p_.extra_key / kWindowBlock + block - own;
      bool const whole = kept == kAllLanes && (block < own ? is_common(block) : all_rows_);
      uint32_t const full = __ballot_sync(kAllLanes, whole);
      if (whole) {
        p_.full[row_ * p_.width + full_ + __popc(full & ((1u << lane_) - 1))] = number;
      }
      full_ += __popc(full);
      for (uint32_t left = __ballot_sync(kAllLanes, kept != 0 && !whole); left != 0;
           left &= left - 1) {
        int32_t const from = __ffs(static_cast<int32_t>(left)) - 1;
        uint32_t const word = __shfl_sync(kAllLanes, kept, from);
        int32_t const at = __shfl_sync(kAllLanes, number, from);
        append(at, first + from < own ? seen_keys(first + from, word) : seen_extra(word));
      }
    }
    if (lane_ == 0) {
      p_.full_counts[row_] = full_;
      p_.counts[row_] = partial_;
    }
  }

 private:
  // Which keys of a block the lane's two rows see.
  struct SeenKeys {
    uint32_t of[2];
  };

  // Whether all rows see all keys of a block, which is a box.
  __device__ bool is_common(int32_t block) const {
    Coord const low = boxes_.position(block * kWindowBlock);
    Coord const high = boxes_.position(block * kWindowBlock + kWindowBlock - 1);
    bool common = all_rows_;
#pragma unroll
    for (int axis = 0; axis < kGridAxes; ++axis) {
      common = common && low[axis] >= common_[axis].begin && high[axis] < common_[axis].end;
    }
    return common;
  }
  __device__ SeenKeys seen_extra(uint32_t kept) const {
    return {{exists_[0] ? kept : 0, exists_[1] ? kept : 0}};
  }
  // A row sees what the windows of its three coordinates have in common.
  __device__ SeenKeys seen_keys(int32_t block, uint32_t kept) const {
    Coord const position = boxes_.position(block * kWindowBlock + lane_);
    SeenKeys seen = {{kept, kept}};
    int32_t first = 0;
#pragma unroll
    for (int axis = 0; axis < kGridAxes; ++axis) {
#pragma unroll 1
      for (int32_t i = 0; i < group_.sides[axis]; ++i) {
        Interval const window = windows_[first + i];
        uint32_t const inside =
            __ballot_sync(kAllLanes, position[axis] >= window.begin && position[axis] < window.end);
        seen.of[0] &= mine_[0][axis] == i ? inside : kAllLanes;
        seen.of[1] &= mine_[1][axis] == i ? inside : kAllLanes;
      }
      first += group_.sides[axis];
    }
    return seen;
  }
  __device__ void append(int32_t number, SeenKeys const& seen) {
    if (!__any_sync(kAllLanes, (seen.of[0] | seen.of[1]) != 0)) {
      return;
    }
    int64_t const place = row_ * p_.width + partial_;
    p_.bits[place * 64 + lane_] = seen.of[0];
    p_.bits[place * 64 + kWarp + lane_] = seen.of[1];
    if (lane_ == 0) {
      p_.indices[place] = number;
    }
    ++partial_;
  }

  WindowLists const& p_;
  int64_t const row_;
  int32_t const lane_;
  WindowGroup const group_;
  KeyBoxes const boxes_;
  Interval (&windows_)[kSides];  // of each coordinate of the rows
  Interval common_[kGridAxes];
  bool all_rows_ = true;
  Coord mine_[2];  // the lane's rows
  bool exists_[2];
  int32_t full_ = 0;
  int32_t partial_ = 0;
};

__global__ void __launch_bounds__(kRowThreads) list_blocks(WindowLists const p) {
  __shared__ Interval windows[kRowWarps][kSides];
  WarpGroup const warp(p);
  if (warp.there) {
    BlockLister(p, warp, windows[threadIdx.x / kWarp]).list();
  }
}

unsigned blocks_for(int64_t threads, char const* of_what) {
  return grid_size((threads + kRowThreads - 1) / kRowThreads, of_what);
}

}  // namespace

void find_tokens(InterleavedGrid const& grid, Coord const& whole, int32_t* rows, int32_t* keys,
                 cudaStream_t stream) {
  find_rows<<<blocks_for(int64_t{64} * grid.groups, "the query rows"), kRowThreads, 0, stream>>>(
      grid, whole, rows);
  int32_t const boxes = Neighborhood::num_key_tiles(grid.params, grid.shape);
  find_keys<<<blocks_for(boxes * volume(grid.shape.k), "the keys"), kRowThreads, 0, stream>>>(
      grid, whole, boxes, keys);
  check_cuda(cudaGetLastError(), "launching the numbering of tokens");
}

void list_windows(WindowLists const& lists, cudaStream_t stream) {
  unsigned const blocks =
      row_blocks(int64_t{lists.grid.groups} * lists.lists, "the groups of 64 query rows");
  mark_keys<<<blocks, kRowThreads, 0, stream>>>(lists);
  list_blocks<<<blocks, kRowThreads, 0, stream>>>(lists);
  check_cuda(cudaGetLastError(), "launching the listing of what was kept");
}

}  // namespace sparse_fmha::device
