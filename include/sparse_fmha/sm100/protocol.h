// What the roles of a block do, and what they wait for: the barriers of a forward kernel with
// tcgen05. Host and device code; no kernel uses it yet: docs/gpus.md.
//
// A block computes one or two query tiles of 128 rows at a time, which share the key tiles. Each
// role is a function over an `Actor`: a kernel's actor waits at mbarriers and issues instructions,
// the checker of tests/host/sm100 writes down what it would do. So what is checked is what runs.
//
//   load         copies queries, keys and values by TMA
//   mma          issues products, which the tensor core computes in order, and commits: a barrier
//                is arrived at when all products issued before are done
//   softmax q    from scores to weights; one for each query tile
//   correction   rescales the output before a product adds to it; normalizes it at the end
//   epilogue     stores finished output by TMA
//
// Keys and values pass through one ring of slots, in the order K0 V0 K1 V1 ...; the tensor core
// takes K0, then V0 and K1, then V1 and K2, so at least two slots are needed. While a product of
// one query tile runs, the softmax of the other does.
#pragma once

#include "sparse_fmha/sm100/tmem_plan.h"

namespace sparse_fmha::sm100 {

// Of each there is one for a query tile or a slot of the ring.
enum class Barrier : int {
  kQueriesFull,   // load (bytes)      -> mma
  kQueriesEmpty,  // mma (commit)      -> load
  kSlotFull,      // load (bytes)      -> mma
  kSlotEmpty,     // mma (commit)      -> load
  kScoresFull,    // mma (commit)      -> softmax
  kWeightsFull,   // softmax           -> mma
  kFactorFull,    // softmax           -> correction: what to rescale by, or at the end the sum
  kFactorEmpty,   // correction        -> softmax
  kOutputReady,   // correction        -> mma: rescaled, or before the first tile free
  kOutputFull,    // mma (commit)      -> correction: the last product is done
  kStageFull,     // correction        -> epilogue: finished output in shared memory
  kStageEmpty,    // epilogue          -> correction
  kBarriers
};
inline constexpr int kMaxSlots = 8;

// Query tiles of a block at a time. A query tile sits out the first key tiles, which only the other
// one sees; all of them if it has no rows, or no keys.
struct Item {
  int tiles = 0;  // of keys
  int passed[kMaxQueryTiles] = {};
  SPARSE_FMHA_HD constexpr bool sees(int q, int i) const { return i >= passed[q]; }
  SPARSE_FMHA_HD constexpr bool any(int q) const { return passed[q] < tiles; }
};

struct Shape {
  int query_tiles;
  int slots;
};

// How often a role has come to each barrier of a kind. The n-th wait is for completion n: parity
// n % 2 of mbarrier.try_wait.
class Visits {
 public:
  SPARSE_FMHA_HD int next(int index) { return count_[index]++; }

 private:
  int count_[kMaxSlots] = {};
};

// A place in the ring of keys and values.
class RingPlace {
 public:
  SPARSE_FMHA_HD explicit RingPlace(int slots) : slots_(slots) {}
  SPARSE_FMHA_HD int take() {
    int const slot = next_;
    next_ = next_ + 1 == slots_ ? 0 : next_ + 1;
    return slot;
  }

 private:
  int const slots_;
  int next_ = 0;
};

// Waits for the release of what the role filled before: not at all the first time.
template <class Actor>
SPARSE_FMHA_HD void wait_empty(Actor& at, Barrier barrier, int index, Visits& visits) {
  int const n = visits.next(index);
  if (n > 0) {
    at.wait(barrier, index, n - 1);
  }
}
template <class Actor>
SPARSE_FMHA_HD void wait_full(Actor& at, Barrier barrier, int index, Visits& visits) {
  at.wait(barrier, index, visits.next(index));
}

template <class Actor>
class LoadRole {
 public:
  SPARSE_FMHA_HD LoadRole(Actor& at, Shape const& shape)
      : at_(at), shape_(shape), place_(shape.slots) {}

  SPARSE_FMHA_HD void run(Item const& item) {
    for (int i = 0; i < item.tiles; ++i) {
      for (int q = 0; q < shape_.query_tiles; ++q) {
        if (i == item.passed[q]) {
          wait_empty(at_, Barrier::kQueriesEmpty, q, queries_);
          at_.load_queries(q);
        }
      }
      load(i, false);
      load(i, true);
    }
  }

 private:
  SPARSE_FMHA_HD void load(int i, bool values) {
    int const slot = place_.take();
    wait_empty(at_, Barrier::kSlotEmpty, slot, slots_);
    at_.load_tile(slot, i, values);
  }

  Actor& at_;
  Shape const shape_;
  RingPlace place_;
  Visits queries_;
  Visits slots_;
};

template <class Actor>
class MmaRole {
 public:
  SPARSE_FMHA_HD MmaRole(Actor& at, Shape const& shape)
      : at_(at), shape_(shape), place_(shape.slots) {}

  SPARSE_FMHA_HD void run(Item const& item) {
    if (item.tiles == 0) {
      return;
    }
    int keys = take();
    for (int q = 0; q < shape_.query_tiles; ++q) {
      scores(item, q, 0, keys);
    }
    at_.commit(Barrier::kSlotEmpty, keys);
    for (int i = 0; i < item.tiles; ++i) {
      int const values = take();
      bool const more = i + 1 < item.tiles;
      keys = more ? take() : 0;
      for (int q = 0; q < shape_.query_tiles; ++q) {
        if (item.sees(q, i)) {
          wait_full(at_, Barrier::kWeightsFull, q, weights_);
          wait_full(at_, Barrier::kOutputReady, q, outputs_);
          at_.add_values(q, values, i, i == item.passed[q]);
        }
        if (more) {
          scores(item, q, i + 1, keys);
        }
      }
      at_.commit(Barrier::kSlotEmpty, values);
      if (more) {
        at_.commit(Barrier::kSlotEmpty, keys);
      }
    }
    for (int q = 0; q < shape_.query_tiles; ++q) {
      if (item.any(q)) {
        at_.commit(Barrier::kOutputFull, q);
      }
    }
  }

 private:
  SPARSE_FMHA_HD int take() {
    int const slot = place_.take();
    wait_full(at_, Barrier::kSlotFull, slot, slots_);
    return slot;
  }
  // Scores go where those of the tile before were, whose weights the product before has read.
  SPARSE_FMHA_HD void scores(Item const& item, int q, int i, int keys) {
    if (!item.sees(q, i)) {
      return;
    }
    if (i == item.passed[q]) {
      wait_full(at_, Barrier::kQueriesFull, q, queries_);
    }
    at_.multiply_keys(q, keys, i);
    at_.commit(Barrier::kScoresFull, q);
    if (i + 1 == item.tiles) {
      at_.commit(Barrier::kQueriesEmpty, q);
    }
  }

  Actor& at_;
  Shape const shape_;
  RingPlace place_;
  Visits queries_;
  Visits slots_;
  Visits weights_;
  Visits outputs_;
};

template <class Actor>
class SoftmaxRole {
 public:
  SPARSE_FMHA_HD SoftmaxRole(Actor& at, int q) : at_(at), q_(q) {}

  SPARSE_FMHA_HD void run(Item const& item) {
    for (int i = item.passed[q_]; i < item.tiles; ++i) {
      wait_full(at_, Barrier::kScoresFull, q_, scores_);
      at_.load_scores(q_, i);
      give_factor(i);
      at_.store_weights(q_, i);
      at_.arrive(Barrier::kWeightsFull, q_);
    }
    give_factor(item.tiles);
  }

 private:
  // Early, so that the correction runs under the exponentials.
  SPARSE_FMHA_HD void give_factor(int i) {
    wait_empty(at_, Barrier::kFactorEmpty, q_, factors_);
    at_.store_factor(q_, i);
    at_.arrive(Barrier::kFactorFull, q_);
  }

  Actor& at_;
  int const q_;
  Visits scores_;
  Visits factors_;
};

template <class Actor>
class CorrectionRole {
 public:
  SPARSE_FMHA_HD CorrectionRole(Actor& at, Shape const& shape) : at_(at), shape_(shape) {}

  SPARSE_FMHA_HD void run(Item const& item) {
    for (int i = 0; i < item.tiles; ++i) {
      for (int q = 0; q < shape_.query_tiles; ++q) {
        if (item.sees(q, i)) {
          take_factor(q, i);
          // The factor follows scores that were committed after the product before.
          if (i > item.passed[q]) {
            at_.rescale_output(q, i);
          }
          at_.arrive(Barrier::kOutputReady, q);
        }
      }
    }
    for (int q = 0; q < shape_.query_tiles; ++q) {
      take_factor(q, item.tiles);
      wait_empty(at_, Barrier::kStageEmpty, q, stages_);
      if (item.any(q)) {
        wait_full(at_, Barrier::kOutputFull, q, outputs_);
        at_.finish_output(q, item.tiles);
      } else {
        at_.clear_stage(q);
      }
      at_.arrive(Barrier::kStageFull, q);
    }
  }

 private:
  SPARSE_FMHA_HD void take_factor(int q, int i) {
    wait_full(at_, Barrier::kFactorFull, q, factors_);
    at_.load_factor(q, i);
    at_.arrive(Barrier::kFactorEmpty, q);
  }

  Actor& at_;
  Shape const shape_;
  Visits factors_;
  Visits outputs_;
  Visits stages_;
};

template <class Actor>
class EpilogueRole {
 public:
  SPARSE_FMHA_HD EpilogueRole(Actor& at, Shape const& shape) : at_(at), shape_(shape) {}

  SPARSE_FMHA_HD void run(Item const& /*item*/) {
    for (int q = 0; q < shape_.query_tiles; ++q) {
      wait_full(at_, Barrier::kStageFull, q, stages_);
      at_.store_stage(q);
      at_.arrive(Barrier::kStageEmpty, q);
    }
  }

 private:
  Actor& at_;
  Shape const shape_;
  Visits stages_;
};

}  // namespace sparse_fmha::sm100
