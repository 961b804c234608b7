#include <algorithm>
#include <cmath>

#include "sparse_fmha/cpu/backward/choose_plan.h"
#include "sparse_fmha/cpu/groups.h"
#include "sparse_fmha/cpu/tiles.h"

namespace sparse_fmha::cpu {
namespace {

constexpr int32_t kMaxKeys = 128;    // across the lanes; their sums stay in the L2 cache
constexpr int32_t kMaxQueries = 64;  // rows processed at a time
// For neighborhoods, where smaller boxes have fewer keys outside the windows.
constexpr int32_t kBoxKeys = 64;
constexpr int32_t kBoxQueries = 16;
constexpr int kThreads = 16;   // that should have work, whatever their actual number
constexpr int32_t kRuns = 16;  // ranges of the keys of stripes, per head
constexpr int32_t kMaxRun = 1024;

// Like tile_cycles of tiles.cpp: rows of queries pass by, keys lie across the lanes.
double key_tile_cycles(double head_dim, double rows, double keys) {
  double const per_score = 2 * head_dim + 20;  // 16 keys with a query: products and weights
  double const per_row = 4 * head_dim;         // loading a query and its gradient
  double const per_key = 1600;                 // loading and transposing it, storing its gradients
  return rows * (std::ceil(keys / 16) * per_score + per_row) + keys * per_key;
}

// The smallest power of two that is at least n, or `most`.
int32_t box_side(int32_t n, int32_t most) {
  int32_t side = 1;
  while (side < n && side < most) {
    side *= 2;
  }
  return side;
}

// Calls body(box) for boxes of up to `most` tokens with sides that are powers of two.
template <class Body>
void for_each_box(Coord const& grid, int32_t most, Body body) {
  Coord box;
  for (box[0] = 1; box[0] / 2 < grid[0] && box[0] <= most; box[0] *= 2) {
    for (box[1] = 1; box[1] / 2 < grid[1] && box[0] * box[1] <= most; box[1] *= 2) {
      box[2] = box_side(grid[2], most / box[0] / box[1]);
      body(box);
    }
  }
}

void tile_keys(FmhaProblem const& problem, Neighborhood::Params const& params, BackwardPlan& plan) {
  double const heads = static_cast<double>(problem.batch) * problem.heads_kv;
  double const group = problem.heads_q / std::max(problem.heads_kv, 1);
  double best = INFINITY;
  for_each_box(params.grid, kBoxKeys, [&](Coord const& k) {
    for_each_box(params.grid, kBoxQueries, [&](Coord const& q) {
      TileShape const shape = {q, k};
      int32_t const tiles = Neighborhood::num_key_tiles(params, shape);
      // The tile in the middle of the first class represents all of them.
      KeyTile middle = {};
      for (int axis = 0; axis < kGridAxes; ++axis) {
        int32_t const half = Neighborhood::length(params, axis, 0) / 2;
        middle.origin[axis] = half / k[axis] * k[axis];
      }
      auto const walk = Neighborhood::walk_transposed(params, shape, middle);
      double const rows = static_cast<double>(walk.num_partial + walk.num_full) * volume(q);
      double const keys = static_cast<double>(volume(params.grid)) / tiles;
      double const cycles =
          std::ceil(heads * tiles / kThreads) *
          key_tile_cycles(0.5 * (problem.head_dim + problem.value_dim), rows * group, keys);
      if (cycles < best) {
        best = cycles;
        plan.by_key = shape;
        plan.key_tiles = tiles;
      }
    });
  });
}

// Keys in a run.
int32_t run_of(int64_t keys) {
  return static_cast<int32_t>(
      std::clamp<int64_t>((keys + kRuns * 64 - 1) / (kRuns * 64) * 64, 64, kMaxRun));
}

void tile_keys(FmhaProblem const&, BlockSparse::Params const& params, BackwardPlan& plan) {
  plan.by_key = {{1, 1, kMaxQueries}, {1, 1, params.block_kv}};
  plan.key_tiles = ceil_div(params.len_kv, params.block_kv);
}

void tile_keys(FmhaProblem const&, Stripe::Params const& params, BackwardPlan& plan) {
  plan.by_key = {{1, 1, kMaxQueries}, {1, 1, kMaxKeys}};
  plan.run_keys = run_of(params.len_kv);
  plan.key_tiles = ceil_div(params.len_kv, plan.run_keys);
}

// Dense and causal attention.
template <class Params>
void tile_keys(FmhaProblem const&, Params const& params, BackwardPlan& plan) {
  plan.by_key = {{1, 1, kMaxQueries}, {1, 1, kMaxKeys}};
  plan.key_tiles = ceil_div(params.len_kv, kMaxKeys);
}

// Runs of all keys, which groups of rows pass by.
template <class M>
void tile_kept_keys(FmhaProblem const& problem, typename M::Params const& params,
                    BackwardPlan& plan) {
  Group<M> const any(params, plan.by_query, 0, nullptr);
  plan.by_key = {any.extent, {1, 1, kMaxKeys}};
  int64_t const keys = volume(problem.grid_kv) + problem.extra_len;
  plan.run_keys = run_of(keys);
  plan.key_tiles = static_cast<int32_t>((keys + plan.run_keys - 1) / plan.run_keys);
}

template <class... M>
void tile_kept_keys(MechanismList<M...>, FmhaProblem const& problem, BackwardPlan& plan) {
  size_t i = 0;
  (void)((i++ == problem.sparsity.index() &&
          (tile_kept_keys<M>(problem, std::get<mechanism_index<M>()>(problem.sparsity), plan),
           true)) ||
         ...);
}

// Calls body(number of visits) for the groups of a head.
template <class M, class Body>
void count_visits(FmhaProblem const& problem, typename M::Params const& params,
                  TileShape const& shape, int32_t groups, Body body) {
  int64_t const keys = volume(shape.k);
  int64_t const extra = (problem.extra_len + keys - 1) / keys;
  std::vector<uint32_t> scratch(Group<M>::scratch_words(problem));
  for (int32_t i = 0; i < groups; ++i) {
    int64_t visits = extra;
    Group<M>(params, shape, i, scratch.data())
        .for_each_tile([](Coord const&, Coord const&) {}, [&](bool) { ++visits; });
    body(visits);
  }
}

template <class M>
std::vector<int64_t> visit_offsets_of(FmhaProblem const& problem) {
  auto const& all = std::get<mechanism_index<M>()>(problem.sparsity);
  Tiling const tiling = choose_tiles(problem, kThreads);
  std::vector<int64_t> offsets = {0};
  for (int32_t head = 0; head < problem.batch * problem.heads_q; ++head) {
    typename M::Params params = all;
    if constexpr (M::kByLists) {
      params = M::for_head(all, head / problem.heads_q, head % problem.heads_q);
    }
    count_visits<M>(problem, params, tiling.shape, tiling.query_tiles,
                    [&](int64_t visits) { offsets.push_back(offsets.back() + visits); });
  }
  return offsets;
}

template <class... M>
std::vector<int64_t> visit_offsets_among(MechanismList<M...>, FmhaProblem const& problem) {
  constexpr std::vector<int64_t> (*kOffsetsOf[])(FmhaProblem const&) = {visit_offsets_of<M>...};
  return kOffsetsOf[problem.sparsity.index()](problem);
}

}  // namespace

std::vector<int64_t> visit_offsets(FmhaProblem const& problem) {
  return visit_offsets_among(Mechanisms{}, problem);
}

BackwardPlan plan_backward(FmhaProblem const& problem) {
  BackwardPlan plan = {};
  Tiling const tiling = choose_tiles(problem, kThreads);
  plan.by_query = tiling.shape;
  plan.query_tiles = tiling.query_tiles;
  if (problem.skip_threshold != nullptr) {
    tile_kept_keys(Mechanisms{}, problem, plan);
    return plan;
  }
  std::visit([&](auto const& params) { tile_keys(problem, params, plan); }, problem.sparsity);
  plan.extra_tiles = ceil_div(problem.extra_len, static_cast<int32_t>(volume(plan.by_key.k)));
  return plan;
}

TransposedLists transpose(BlockSparse::Params const& p, int32_t batch, int32_t heads,
                          TransposedMemory& memory) {
  int64_t const query_blocks = ceil_div(p.len_q, p.block_q);
  int64_t const key_blocks = ceil_div(p.len_kv, p.block_kv);
  int32_t const lists_batch = p.batch_stride == 0 ? 1 : batch;
  int32_t const lists_heads = p.head_stride == 0 ? 1 : heads;
  // Calls body(row of the lists' offsets, block of keys, entry) in order of the query blocks.
  auto for_each_entry = [&](auto body) {
    for (int32_t b = 0; b < lists_batch; ++b) {
      for (int32_t h = 0; h < lists_heads; ++h) {
        BlockSparse::Params const own = BlockSparse::for_head(p, b, h);
        int64_t const row = (int64_t{b} * lists_heads + h) * (key_blocks + 1);
        for (int32_t q = 0; q < query_blocks; ++q) {
          for (bool partial : {true, false}) {
            BlockSparse::Lists const& lists = partial ? own.partial : own.full;
            for (int32_t i = 0; i < BlockSparse::count(lists, q); ++i) {
              int32_t const block = lists.indices[int64_t{q} * lists.width + i];
              if (block >= 0 && block < key_blocks) {
                body(row + block, TransposedLists::Entry{q, partial ? i + 1 : 0});
              }
            }
          }
        }
      }
    }
  };
  auto& offsets = memory.offsets;
  offsets.assign(int64_t{lists_batch} * lists_heads * (key_blocks + 1) + 1, 0);
  for_each_entry([&](int64_t place, TransposedLists::Entry const&) { ++offsets[place + 1]; });
  for (size_t i = 1; i < offsets.size(); ++i) {
    offsets[i] += offsets[i - 1];
  }
  memory.entries.resize(offsets.back());
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
  for_each_entry([&](int64_t place, TransposedLists::Entry const& entry) {
    memory.entries[next[place]++] = entry;
  });
  TransposedLists lists;
  lists.offsets = offsets.data();
  lists.entries = memory.entries.data();
  lists.head_stride = p.head_stride == 0 ? 0 : key_blocks + 1;
  lists.batch_stride = p.batch_stride == 0 ? 0 : lists_heads * (key_blocks + 1);
  return lists;
}

}  // namespace sparse_fmha::cpu
