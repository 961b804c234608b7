// The protocol of sm100/protocol.h: right in every interleaving, and each wait and each arrival of
// it is needed.
//
//   protocol check        prints "QUERY_TILES SLOTS TILES PASSED PASSED STATES FAULT" for each case
//   protocol mutations    prints "ROLE BARRIER KIND FAULT" for each thing left out or done early
//   protocol overlap      the same for plans of tensor memory in which columns overlap
//
// FAULT is "right" or what is wrong.
#include <cstdio>
#include <cstring>

#include "checker.h"

using namespace checker;

namespace {

char const* text(std::string const& fault) { return fault.empty() ? "right" : fault.c_str(); }

void check(TmemPlan const& plan, int slots, std::vector<Item> const& items) {
  Explorer explorer({plan.query_tiles, slots}, plan, items);
  std::string const fault = explorer.run();
  int tiles = 0;
  for (Item const& item : items) {
    tiles += item.tiles;
  }
  Item const& first = items[0];
  std::printf("%d %d %d %d %d %zu %s\n", plan.query_tiles, slots, tiles, first.passed[0],
              first.passed[1], explorer.states(), text(fault));
}

void check_all() {
  for (int tiles = 0; tiles <= 6; ++tiles) {
    for (int head_dim : {64, 128, 256}) {
      for (int slots = 2; slots <= 4; ++slots) {
        check(tmem_plan(head_dim), slots, {{tiles}});
      }
    }
    for (int passed = 1; passed <= tiles; ++passed) {  // one sits out the first tiles, or all
      check(tmem_plan(128), 2, {{tiles, {passed, 0}}});
      check(tmem_plan(128), 3, {{tiles, {0, passed}}});
    }
  }
}

// Several items one after the other: what the first leaves behind.
std::vector<std::vector<Item>> const kSeveral = {
    {{1}, {1}, {1}}, {{2}, {1}}, {{3, {0, 1}}, {2}}, {{2, {2, 0}}, {2, {0, 2}}}, {{1}, {0}, {2}},
};

void check_several() {
  for (auto const& items : kSeveral) {
    check(tmem_plan(128), 2, items);
    check(tmem_plan(128), 3, items);
  }
  check(tmem_plan(256), 2, {{3}, {0}, {2}});
}

// Whether a role has the wait or the arrival that a mutation changes.
bool changes(Mutation const& mutation, TmemPlan const& plan, std::vector<Item> const& items) {
  auto count = [&](Mutation const& with) {
    Explorer explorer({2, 2}, plan, items, with);
    return explorer.written(mutation.role);
  };
  return count(mutation) != count({});
}

void mutate_all() {
  static char const* const kinds[] = {"none", "no wait", "no arrival", "early"};
  TmemPlan const plan = tmem_plan(128);
  for (int role = 0; role < kRoles; ++role) {
    for (int barrier = 0; barrier < static_cast<int>(Barrier::kBarriers); ++barrier) {
      for (auto kind : {Mutation::kNoWait, Mutation::kNoArrival, Mutation::kEarly}) {
        Mutation const mutation{role, static_cast<Barrier>(barrier), kind};
        std::string fault;
        bool changed = false;
        for (auto const& items : kSeveral) {
          if (fault.empty() && changes(mutation, plan, items)) {
            changed = true;
            fault = Explorer({2, 2}, plan, items, mutation).run();
          }
        }
        if (changed) {
          std::printf("%d %d %s: %s\n", role, barrier, kinds[kind], text(fault));
        }
      }
    }
  }
}

void overlap_all() {
  std::vector<Item> const items = {{3}};
  auto with = [&](char const* what, auto change) {
    TmemPlan plan = tmem_plan(128);
    change(plan);
    std::printf("%s: %s\n", what, text(Explorer({2, 2}, plan, items).run()));
  };
  with("none", [](TmemPlan&) {});
  with("weights in the lower half of the scores",  // as good a place
       [](TmemPlan& plan) { plan.tiles[0].weights.first = plan.tiles[0].scores.first; });
  with("scores of both query tiles", [](TmemPlan& plan) {
    plan.tiles[1].scores = plan.tiles[0].scores;
    plan.tiles[1].weights = plan.tiles[0].weights;
  });
  with("weights of one in the scores of the other",
       [](TmemPlan& plan) { plan.tiles[0].weights = plan.tiles[1].weights; });
  with("output of one in the output of the other",
       [](TmemPlan& plan) { plan.tiles[1].output.first -= kGranule; });
  with("output in the scores", [](TmemPlan& plan) { plan.tiles[0].output.first -= kGranule; });
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  char const* const what = argc > 1 ? argv[1] : "";
  if (std::strcmp(what, "check") == 0) {
    check_all();
    check_several();
  } else if (std::strcmp(what, "mutations") == 0) {
    mutate_all();
  } else if (std::strcmp(what, "overlap") == 0) {
    overlap_all();
  } else {
    return 2;
  }
}
