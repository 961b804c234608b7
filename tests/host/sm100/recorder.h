// What the roles of sm100/protocol.h do, written down: operations on barriers and on cells of
// memory.
//
// Tensor memory is cells of its columns, so that names do not hide an overlap; all else has a cell
// for each buffer. A value has a number, and is used a number of times.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "sparse_fmha/sm100/protocol.h"

namespace checker {

using namespace sparse_fmha::sm100;

enum Agent : int { kLoad, kMma, kSoftmax0, kSoftmax1, kCorrection, kEpilogue, kRoles };
constexpr int kTensorCore = kRoles;
constexpr int kAgents = kRoles + 1;

constexpr int kGranule = 32;  // columns of tensor memory that are checked as one
constexpr int kCells = kTmemColumns / kGranule + 3 * kMaxQueryTiles + kMaxSlots;
enum Place : int {
  kTmem = 0,
  kQueries = kTmemColumns / kGranule,
  kFactors = kQueries + kMaxQueryTiles,
  kStages = kFactors + kMaxQueryTiles,
  kSlots = kStages + kMaxQueryTiles,
};

// A use of consecutive cells.
struct Access {
  int first = 0;
  int count = 1;
  int expects = 0;  // the value before; 0: any that is no longer needed
  int leaves = 0;   // the value after; 0: it was only read
  int reads = 0;    // how often that will be used
};

struct Operation {
  enum Kind { kWait, kArrive, kBegin, kEnd, kIssue, kCopy } kind;
  Barrier barrier = Barrier::kBarriers;
  int index = 0;
  int completion = 0;  // which one a wait is for
  std::vector<Access> uses;
};

// What is left out or done too early, to see that it is noticed.
struct Mutation {
  int role = -1;
  Barrier barrier = Barrier::kBarriers;
  enum Kind { kNone, kNoWait, kNoArrival, kEarly } kind = kNone;
  bool is(int r, Barrier b, Kind k) const { return role == r && barrier == b && kind == k; }
};

enum Value : int { kAQuery = 1, kKey, kAValue, kScore, kWeight, kFactor, kRaw, kRescaled, kDone };

// Writes down what a role does.
class Recorder {
 public:
  Recorder(int role, Shape const& shape, TmemPlan const& plan, Mutation const& mutation)
      : role_(role), shape_(shape), plan_(plan), mutation_(mutation) {}

  std::vector<Operation> operations;
  std::vector<Operation> issued;  // to the tensor core

  void start(Item const& item, int number) {
    item_ = item;
    number_ = number;
  }

  void wait(Barrier barrier, int index, int completion) {
    if (!mutation_.is(role_, barrier, Mutation::kNoWait)) {
      operations.push_back({Operation::kWait, barrier, index, completion, {}});
    }
  }
  void arrive(Barrier barrier, int index) {
    add_arrival(operations, {Operation::kArrive, barrier, index, 0, {}});
  }
  void commit(Barrier barrier, int index) {
    if (add_arrival(issued, {Operation::kArrive, barrier, index, 0, {}})) {
      operations.push_back({Operation::kIssue, {}, 0, 0, {}});
    }
  }

  void load_queries(int q) {
    copy(Barrier::kQueriesFull, q,
         {kQueries + q, 1, 0, value(kAQuery, q, 0), item_.tiles - item_.passed[q]});
  }
  void load_tile(int slot, int i, bool values) {
    int readers = 0;
    for (int q = 0; q < shape_.query_tiles; ++q) {
      readers += item_.sees(q, i);
    }
    copy(Barrier::kSlotFull, slot,
         {kSlots + slot, 1, 0, value(values ? kAValue : kKey, 0, i), readers});
  }
  void multiply_keys(int q, int slot, int i) {
    issue({{kQueries + q, 1, value(kAQuery, q, 0)},
           {kSlots + slot, 1, value(kKey, 0, i)},
           write(plan_.tiles[q].scores, value(kScore, q, i), 1)});
  }
  void add_values(int q, int slot, int i, bool first) {
    Access output = write(plan_.tiles[q].output, value(kRaw, q, i), 1);
    output.expects = first ? 0 : value(kRescaled, q, i);
    issue({read(plan_.tiles[q].weights, value(kWeight, q, i)),
           {kSlots + slot, 1, value(kAValue, 0, i)},
           output});
  }
  void load_scores(int q, int i) { use({read(plan_.tiles[q].scores, value(kScore, q, i))}); }
  void store_weights(int q, int i) {
    use({write(plan_.tiles[q].weights, value(kWeight, q, i), 1)});
  }
  void store_factor(int q, int i) { use({{kFactors + q, 1, 0, value(kFactor, q, i), 1}}); }
  void load_factor(int q, int i) { use({{kFactors + q, 1, value(kFactor, q, i)}}); }
  void rescale_output(int q, int i) {
    Access output = write(plan_.tiles[q].output, value(kRescaled, q, i), 1);
    output.expects = value(kRaw, q, i - 1);
    use({output});
  }
  void finish_output(int q, int tiles) {
    use({read(plan_.tiles[q].output, value(kRaw, q, tiles - 1)), stage(q)});
  }
  void clear_stage(int q) { use({stage(q)}); }
  void store_stage(int q) { use({{kStages + q, 1, value(kDone, q, 0)}}); }

 private:
  // Values of different items differ.
  int value(Value kind, int q, int i) const {
    return ((number_ * 16 + i) * kMaxQueryTiles + q) * 16 + kind;
  }
  Access stage(int q) const { return {kStages + q, 1, 0, value(kDone, q, 0), 1}; }
  static Access read(Columns const& columns, int expects) {
    return {kTmem + columns.first / kGranule, columns.count / kGranule, expects};
  }
  static Access write(Columns const& columns, int leaves, int reads) {
    return {kTmem + columns.first / kGranule, columns.count / kGranule, 0, leaves, reads};
  }
  void use(std::vector<Access> uses) {
    operations.push_back({Operation::kBegin, {}, 0, 0, uses});
    operations.push_back({Operation::kEnd, {}, 0, 0, std::move(uses)});
  }
  void copy(Barrier full, int index, Access const& to) {
    operations.push_back({Operation::kCopy, full, index, 0, {to}});
  }
  void issue(std::vector<Access> uses) {
    issued.push_back({Operation::kBegin, {}, 0, 0, uses});
    issued.push_back({Operation::kEnd, {}, 0, 0, std::move(uses)});
    operations.push_back({Operation::kIssue, {}, 0, 0, {}});
    operations.push_back({Operation::kIssue, {}, 0, 0, {}});
  }
  bool add_arrival(std::vector<Operation>& to, Operation const& arrival) {
    if (mutation_.is(role_, arrival.barrier, Mutation::kNoArrival)) {
      return false;
    }
    auto before = to.end();
    if (mutation_.is(role_, arrival.barrier, Mutation::kEarly)) {
      while (before != to.begin() &&
             (before == to.end() || before->kind != Operation::kEnd)) {  // of what it announces
        --before;
      }
    }
    to.insert(before, arrival);
    return true;
  }

  int const role_;
  Shape const shape_;
  TmemPlan const& plan_;
  Mutation const mutation_;
  Item item_;
  int number_ = 0;
};

}  // namespace checker
