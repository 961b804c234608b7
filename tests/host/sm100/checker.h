// Explores every interleaving of the roles of sm100/protocol.h.
//
// Each role runs once with an actor that writes its operations down. Then all orders in which the
// operations of different roles can happen are visited, together with the tensor core, which
// executes what was issued in order, and copies in flight, which end in any order. Checked at each
// operation:
//
//   - what is read has the value that the role expects, and nobody is writing it;
//   - what is written has been read as often as it must be, and nobody uses it. Tensor memory is
//     checked by columns, so that names do not hide an overlap;
//   - a wait passes for the completion that it is for, not for a later one with the same parity;
//   - somebody can go on until all roles have ended.
//
// The threads of a role count as one: that all of them have arrived is not in question here.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <unordered_set>
#include <vector>

#include "recorder.h"

namespace checker {

struct Cell {
  int16_t value = 0;
  int8_t left = 0;   // uses to come
  int8_t users = 0;  // -1: somebody writes
};

struct State {
  std::array<uint8_t, kAgents> at = {};  // the next operation
  uint8_t copying = 0;                   // bit n: the n-th of the places that copies fill
  uint8_t issued = 0;
  std::array<std::array<uint8_t, kMaxSlots>, static_cast<int>(Barrier::kBarriers)> completed = {};
  std::array<Cell, kCells> cells;

  // Of the rest of the state, which follows from it.
  uint64_t key() const {
    uint64_t key = copying;
    for (uint8_t place : at) {
      key = key << 8 | place;
    }
    return key;
  }
};

class Explorer {
 public:
  Explorer(Shape const& shape, TmemPlan const& plan, std::vector<Item> const& items,
           Mutation const& mutation = {})
      : shape_(shape) {
    for (int role = 0; role < kRoles; ++role) {
      Recorder to(role, shape, plan, mutation);
      record(role, to, items);
      if (role == kMma) {
        operations_[kTensorCore] = to.issued;
      }
      operations_[role] = to.operations;
    }
    for (auto const& list : operations_) {
      if (list.size() > 255) {
        fault_ = "too many operations to count in a byte";
      }
    }
  }

  // Visits all states; returns what is wrong, or an empty string.
  std::string run() {
    std::vector<State> open = {State{}};
    seen_.insert(open.back().key());
    while (!open.empty() && fault_.empty()) {
      State const state = open.back();
      open.pop_back();
      bool moved = false;
      for (int agent = 0; agent < kAgents; ++agent) {
        State next = state;
        if (move(next, agent)) {
          moved = true;
          visit(open, next);
        }
      }
      for (int place = 0; place < 8; ++place) {
        if (state.copying >> place & 1) {
          State next = state;
          end_copy(next, place);
          moved = true;
          visit(open, next);
        }
      }
      if (!moved && !is_end(state)) {
        fail("deadlock", state);
      }
      ends_ += !moved && is_end(state);
    }
    if (fault_.empty() && ends_ != 1) {
      fault_ = "there is more than one end";
    }
    return fault_;
  }
  std::size_t states() const { return seen_.size(); }
  // What a role does, in a form that can be compared.
  std::string written(int role) const {
    std::string text;
    for (int agent : {role, static_cast<int>(role == kMma ? kTensorCore : role)}) {
      for (Operation const& what : operations_[agent]) {
        text += std::to_string(what.kind) + " " + std::to_string(static_cast<int>(what.barrier)) +
                " " + std::to_string(what.index) + ",";
      }
    }
    return text;
  }

 private:
  void record(int role, Recorder& to, std::vector<Item> const& items) {
    auto all = [&](auto machine) {
      for (std::size_t i = 0; i < items.size(); ++i) {
        to.start(items[i], static_cast<int>(i));
        machine.run(items[i]);
      }
    };
    switch (role) {
      case kLoad:
        return all(LoadRole<Recorder>(to, shape_));
      case kMma:
        return all(MmaRole<Recorder>(to, shape_));
      case kSoftmax0:
        return all(SoftmaxRole<Recorder>(to, 0));
      case kSoftmax1:
        return shape_.query_tiles > 1 ? all(SoftmaxRole<Recorder>(to, 1)) : void();
      case kCorrection:
        return all(CorrectionRole<Recorder>(to, shape_));
      default:
        return all(EpilogueRole<Recorder>(to, shape_));
    }
  }

  void visit(std::vector<State>& open, State const& state) {
    if (fault_.empty() && seen_.insert(state.key()).second) {
      open.push_back(state);
    }
  }
  bool is_end(State const& state) const {
    for (int agent = 0; agent < kAgents; ++agent) {
      if (state.at[agent] < operations_[agent].size()) {
        return false;
      }
    }
    for (Cell const& cell : state.cells) {
      if (cell.left != 0 || cell.users != 0) {
        return false;  // something was never used
      }
    }
    return state.copying == 0;
  }

  // A move of an agent: waits, then operations up to the next wait or one use of memory, with the
  // arrivals that follow. False if it has to wait, or has ended.
  //
  // Steps in between need no states of their own. Others can do no less while memory is still in
  // use than before the arrival that follows the use, and a use that begins later than its wait
  // is one whose wait was later, too.
  bool move(State& state, int agent) {
    auto const& list = operations_[agent];
    uint8_t const limit = agent == kTensorCore ? state.issued : static_cast<uint8_t>(list.size());
    uint8_t& at = state.at[agent];
    uint8_t const start = at;
    while (at < limit && list[at].kind == Operation::kWait) {
      int const completed = done(state, list[at]);
      if (completed % 2 == list[at].completion % 2) {
        return at > start;
      }
      if (completed != list[at].completion + 1) {
        fail("a wait passes for another completion", state);
      }
      ++at;
    }
    for (bool used = false; at < limit && list[at].kind != Operation::kWait; ++at) {
      bool const uses = list[at].kind != Operation::kArrive && list[at].kind != Operation::kIssue;
      if (used && uses) {
        break;
      }
      used |= uses;
      act(state, list[at]);
    }
    return at > start;
  }
  void act(State& state, Operation const& what) {
    switch (what.kind) {
      case Operation::kArrive:
        ++done(state, what);
        break;
      case Operation::kIssue:
        ++state.issued;
        break;
      case Operation::kCopy:
        state.copying |= uint8_t{1} << copy_of(what);
        begin(state, what);
        break;
      case Operation::kBegin:
        begin(state, what);
        break;
      case Operation::kEnd:
        end(state, what);
        break;
      case Operation::kWait:
        break;
    }
  }

  static uint8_t& done(State& state, Operation const& what) {
    return state.completed[static_cast<int>(what.barrier)][what.index];
  }

  // Places that copies fill: the queries, then the slots. What a copy leaves follows from the
  // number of operations of the role that started it, so it is found again by that.
  static int copy_of(Operation const& what) {
    return what.barrier == Barrier::kQueriesFull ? what.index : kMaxQueryTiles + what.index;
  }
  void end_copy(State& state, int place) {
    // The latest copy to this place that was started.
    for (int n = state.at[kLoad]; n-- > 0;) {
      Operation const& what = operations_[kLoad][n];
      if (what.kind == Operation::kCopy && copy_of(what) == place) {
        end(state, what);
        ++done(state, what);
        state.copying &= ~(uint8_t{1} << place);
        return;
      }
    }
  }

  void begin(State& state, Operation const& what) {
    for (Access const& use : what.uses) {
      for (int c = use.first; c < use.first + use.count; ++c) {
        Cell& cell = state.cells[c];
        bool const known =
            use.expects == 0 ? cell.left == 0 : cell.value == use.expects && cell.left > 0;
        bool const free = use.leaves == 0 ? cell.users >= 0 : cell.users == 0;
        if (!known || !free) {
          fail((known ? "in use: cell " : "another value: cell ") + std::to_string(c), state);
          return;
        }
        cell.users = use.leaves == 0 ? cell.users + 1 : -1;
      }
    }
  }
  void end(State& state, Operation const& what) {
    for (Access const& use : what.uses) {
      for (int c = use.first; c < use.first + use.count; ++c) {
        Cell& cell = state.cells[c];
        if (use.leaves == 0) {
          --cell.users;
          --cell.left;
        } else {
          cell = {static_cast<int16_t>(use.leaves), static_cast<int8_t>(use.reads), 0};
        }
      }
    }
  }

  // Keeps the first fault.
  void fail(std::string const& what, State const& state) {
    if (fault_.empty()) {
      fault_ = what + ", " + describe(state);
    }
  }
  std::string describe(State const& state) const {
    static char const* const names[] = {"load",       "mma",      "softmax 0",  "softmax 1",
                                        "correction", "epilogue", "tensor core"};
    std::string text;
    for (int agent = 0; agent < kAgents; ++agent) {
      text += std::string(agent == 0 ? "" : ", ") + names[agent] + " " +
              std::to_string(state.at[agent]) + "/" + std::to_string(operations_[agent].size());
    }
    return text;
  }

  Shape const shape_;
  std::array<std::vector<Operation>, kAgents> operations_;
  std::unordered_set<uint64_t> seen_;
  std::string fault_;
  int ends_ = 0;
};

}  // namespace checker
