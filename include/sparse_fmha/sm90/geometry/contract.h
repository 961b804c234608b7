// The interface of a geometry, which knows where the tokens of a tile lie in memory.
//
// A mechanism decides which key tiles a query tile visits, with integer arithmetic. A geometry
// locates query tiles, copies tiles from and to global memory, and masks partial tiles. It is a
// class template over the kernel's Traits and the Mechanism; each thread holds one object:
//
//   struct Params;                            tensors and tile shapes, passed to the kernel
//   struct Shared;                            what it keeps in shared memory
//   struct Work;                              a query tile; its `tile` is the scheduler's
//   init()                                    by all threads, which synchronize afterwards
//   prepare(Work&, WorkTile, place)           one thread prepares a query tile for all others
//   has_row(Work, consumer, row)              whether the tensor has this row of a consumer
//   load_q(barrier, to, Work, consumer)       a consumer's 64 queries, from each tensor of the
//                                             Traits
//   store_out(from, Work, consumer)           a consumer's 64 rows, clipped to the tensor
//   visit_rows(Work, consumer, row, body)     body(r, value) with a row's RowValue, for rows
//                                             `row` and `row` + 8 that the tensor has
//   static launch(problem, context)           on the host
//
// The key tiles of a query tile pass through a ring of stages, in the order of the walk:
//
//   boxes(Work)                               for the loading warp: `count` and next(i)
//   tiles_loaded(Work)                        their number, for the consumers
//   part_walk(Work, consumer)                 tiles of a consumer's rows: num_partial, num_full
//   struct Source;  source(Work, box)         where a box lies
//   load_k, load_v(barrier, to, Source)       copies of a box
//   publish(box, place)                       writes what consumers need to know of the stage
//   key_index(Work, box, w, column)           for kernels with biases, by a whole warp: the number,
//                                             in its head, of the key in a column, 32 * w + lane;
//                                             negative if there is none or it has no bias
//
// A consumer's mask, of which each thread holds two rows:
//
//   struct MaskPlace;                         where the mask of a key tile is looked up
//   mask_place(walk, i, place)                for the walk's i-th tile
//   class Mask                                Mask(geometry, consumer), set(Work),
//                                             look_up(Work, MaskPlace) -> Seen, sees(Seen, i)
//
// Four constants select how a geometry works. Each is an enum below, which names the further
// members that it requires. kRowThresholds says whether its rows may have thresholds for the biases
// of keys; then it has query(Work, consumer, row), the number of a row, or of the last one, in its
// head. kNotesSkipped says whether kernels that skip can note which key tiles they do skip; then
// group(Work, consumer) is the number of a consumer's 64 rows. Tiles are numbered from the last one
// of a consumer's walk.
#pragma once

#include <type_traits>

#include "sparse_fmha/core/registry.h"
#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"

namespace sparse_fmha::sm90 {

// kStageUse: which stages a consumer computes.
enum class StageUse {
  kLast,     // the last ones: it passes over the first stages if its part of the walk is shorter
  kNeeded,   // the partial ones for which needs(consumer, place) is true, and all full ones
  kStreams,  // its own and the shared ones: part_walk() is a ListWalk, which locates them
};

// kLoader: who copies key tiles.
enum class Loader {
  kOneLane,          // one lane, in large boxes
  kAllLanes,         // a box per lane, one warp each for keys and values; has
                     // look_through(Work, place), copied_bytes(Source, bytes),
                     // copy_bits(box, place, barrier)
  kAllLanesAndRows,  // the same, and single rows are gathered
};

// kMaskFrom: where a consumer looks up a mask.
enum class MaskFrom {
  kPositions,  // from positions, without a lookup
  kStage,      // in what publish() wrote, before the stage is released
  kMaskWarp,   // the same, but written by a mask warp; requires masks()
};

// kMaskedStages: which stages of a walk are masked.
enum class MaskedStages {
  kPartial,  // the partial ones, which come first
  kByWalk,   // those for which is_masked(i) is true; they surround the walk's `whole`
};

template <class Geometry>
inline constexpr bool kWarpLoads = Geometry::kLoader != Loader::kOneLane;
template <class Geometry>
inline constexpr bool kGathers = Geometry::kLoader == Loader::kAllLanesAndRows;
template <class Geometry>
inline constexpr bool kHasStreams = Geometry::kStageUse == StageUse::kStreams;
template <class Geometry>
inline constexpr int kMaskWarps = Geometry::kMaskFrom == MaskFrom::kMaskWarp ? 1 : 0;

// Whether `f` can be called with these arguments.
template <class... Args, class F>
constexpr bool compiles(F /*f*/) {
  return std::is_invocable_v<F, Args...>;
}
struct AnyRow {
  template <class Value>
  __device__ void operator()(int r, Value& value) const;
};
#define SPARSE_FMHA_HAS(expression) \
  ->decltype(expression, void()) {}

// Fails to compile, with a message that names the missing member, if G is not a geometry.
template <class G, class Traits>
constexpr bool is_geometry() {
  using Place = RingState<Traits::kStages>;
  using Element = typename Traits::Element;
  using Work = typename G::Work;
  using Source = typename G::Source;
  using Mask = typename G::Mask;
  using MaskPlace = typename G::MaskPlace;
  using Box = decltype(std::declval<G const&>().boxes(std::declval<Work const&>()).next(0));
  using Walk = decltype(std::declval<G const&>().part_walk(std::declval<Work const&>(), 0));

  static_assert(sizeof(typename G::Params) > 0 && sizeof(typename G::Shared) > 0,
                "a geometry has Params, which the launcher fills, and Shared, in shared memory");
  static_assert(std::is_same_v<decltype(Work::tile), WorkTile>,
                "the Work of a geometry holds the scheduler's tile");
  static_assert(std::is_same_v<decltype(G::kStageUse), StageUse const> &&
                    std::is_same_v<decltype(G::kLoader), Loader const> &&
                    std::is_same_v<decltype(G::kMaskFrom), MaskFrom const> &&
                    std::is_same_v<decltype(G::kMaskedStages), MaskedStages const>,
                "a geometry says who copies key tiles, who computes them and what masks them");
  static_assert(std::is_same_v<decltype(G::kRowThresholds), bool const>,
                "a geometry says in kRowThresholds whether its rows may have thresholds");
  static_assert(G::kGatherWarps >= 0, "a geometry says how many more warps gather rows, or 0");
  static_assert(kGathers<G> || G::kGatherWarps == 0, "warps gather rows only where rows are");

  static_assert(compiles<G const&>([](auto& g) SPARSE_FMHA_HAS(g.init())),
                "a geometry prepares its shared memory in init()");
  static_assert(compiles<G const&, Work&, RingState<1>>(
                    [](auto& g, auto& w, auto s) SPARSE_FMHA_HAS(g.prepare(w, WorkTile{}, s))),
                "one thread works a query tile out in prepare(Work&, WorkTile, place)");
  static_assert(compiles<G const&, Work&>([](auto& g, auto& w) SPARSE_FMHA_HAS(g.has_row(w, 0, 0))),
                "a geometry tells by has_row(Work, consumer, row) where the tensor ends");
  static_assert(compiles<G const&, Work&, FullBarrier&, Element*>(
                    [](auto& g, auto& w, auto& b, auto* to) SPARSE_FMHA_HAS(g.load_q(b, to, w, 0))),
                "a geometry copies queries in load_q(barrier, to, Work, consumer)");
  static_assert(compiles<G const&, Work&, Element const*>(
                    [](auto& g, auto& w, auto* from) SPARSE_FMHA_HAS(g.store_out(from, w, 0))),
                "a geometry stores the output in store_out(from, Work, consumer)");
  static_assert(compiles<G const&, Work&, AnyRow>([](auto& g, auto& w, auto body)
                                                      SPARSE_FMHA_HAS(g.visit_rows(w, 0, 0, body))),
                "a geometry finds what there is of rows in visit_rows(Work, consumer, row, body)");

  static_assert(compiles<G const&, Work&>([](auto& g, auto& w) SPARSE_FMHA_HAS(
                    (static_cast<int>(g.boxes(w).count), static_cast<int>(g.tiles_loaded(w))))),
                "boxes(Work) has a count, which consumers are told by tiles_loaded(Work)");
  static_assert(sizeof(decltype(Walk::num_partial)) && sizeof(decltype(Walk::num_full)),
                "part_walk(Work, consumer) says how many key tiles are partial and how many full");
  static_assert(compiles<G const&, Work&, Box&>([](auto& g, auto& w, auto& box)
                                                    SPARSE_FMHA_HAS(Source(g.source(w, box)))),
                "a geometry finds a box by source(Work, box)");
  static_assert(compiles<G const&, Source&, FullBarrier&, Element*>(
                    [](auto& g, auto& from, auto& b, auto* to)
                        SPARSE_FMHA_HAS((g.load_k(b, to, from), g.load_v(b, to, from)))),
                "a geometry copies keys and values in load_k, load_v(barrier, to, Source)");
  static_assert(compiles<G const&, Box&, Place>([](auto& g, auto& box, auto s)
                                                    SPARSE_FMHA_HAS(g.publish(box, s))),
                "a geometry leaves what consumers have to know in publish(box, place)");

  static_assert(!Traits::kKeyBias || compiles<G const&, Work&, Box&>([
  ](auto& g, auto& w, auto& box) SPARSE_FMHA_HAS(int64_t(g.key_index(w, box, 0, 0)))),
                "a geometry finds the biases of a stage by key_index(Work, box, w, column)");
  static_assert(std::is_same_v<decltype(G::kNotesSkipped), bool const>,
                "a geometry says in kNotesSkipped whether skipped tiles can be noted");
  static_assert(!G::kNotesSkipped || compiles<G const&, Work&>([](
                                         auto& g, auto& w) SPARSE_FMHA_HAS(int32_t(g.group(w, 0)))),
                "kNotesSkipped: group(Work, consumer) is the number of a consumer's 64 rows");
  static_assert(!G::kRowThresholds || compiles<G const&, Work&>([
  ](auto& g, auto& w) SPARSE_FMHA_HAS(int32_t(g.query(w, 0, 0)))),
                "kRowThresholds: query(Work, consumer, row) is the number of a row in its head");
  static_assert(compiles<G const&, Walk&, Place>([](auto& g, auto& walk, auto s) SPARSE_FMHA_HAS(
                    MaskPlace(g.mask_place(walk, 0, s)))),
                "mask_place(walk, i, place) is where a consumer looks up a mask");
  static_assert(std::is_constructible_v<Mask, G const&, int>,
                "a Mask is made of the geometry and the number of a consumer");
  static_assert(compiles<Mask&, Work&, MaskPlace>([](auto& mask, auto& w, auto at) SPARSE_FMHA_HAS(
                    (mask.set(w), bool(mask.sees(mask.look_up(w, at), 0))))),
                "a Mask has set(Work), look_up(Work, MaskPlace) and sees(seen, i)");

  static_assert(G::kStageUse != StageUse::kNeeded || compiles<G const&, Place>([
                ](auto& g, auto s) SPARSE_FMHA_HAS(bool(g.needs(0, s)))),
                "kNeeded: a consumer asks needs(consumer, place)");
  static_assert(!kHasStreams<G> || compiles<Walk&>([](auto& walk) SPARSE_FMHA_HAS(
                                       (bool(walk.follows_other(1)), int(walk.position(0))))),
                "kStreams: a walk has follows_other(i) and position(i)");
  static_assert(G::kMaskedStages != MaskedStages::kByWalk ||
                    compiles<Walk&>([](auto& walk) SPARSE_FMHA_HAS(
                        (bool(walk.is_masked(0)), int(walk.whole.begin), int(walk.both)))),
                "kByWalk: a walk has is_masked(i), and the stages `whole` that are not masked");
  static_assert(!kWarpLoads<G> || compiles<G const&, Work&, Box&, Place, FullBarrier&>(
                                      [](auto& g, auto& w, auto& box, auto s, auto& b)
                                          SPARSE_FMHA_HAS((g.look_through(w, RingState<1>{}),
                                                           g.copied_bytes(g.source(w, box), 0u),
                                                           g.copy_bits(box, s, b)))),
                "kAllLanes: a geometry has look_through, copied_bytes and copy_bits");
  static_assert(G::kGatherWarps == 0 || compiles<G const&, Work&>([
                ](auto& g, auto& w) SPARSE_FMHA_HAS(int(g.rows(w, 0).count))),
                "kGatherWarps: rows(Work, part) are the rows that a warp gathers");
  static_assert(
      kMaskWarps<G> == 0 || compiles<G const&, Work&, Box&, Place>(
                                [](auto& g, auto& w, auto& box, auto s) SPARSE_FMHA_HAS(
                                    (g.masks().find_windows(w), g.masks().publish(box, s)))),
      "kMaskWarp: masks() has find_windows(Work) and publish(box, place)");
  static_assert(
      std::is_same_v<decltype(&G::launch), void (*)(FmhaProblem const&, ExecutionContext const&)>,
      "a geometry has static launch(problem, context)");
  return true;
}

#undef SPARSE_FMHA_HAS

}  // namespace sparse_fmha::sm90
