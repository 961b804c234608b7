// Prints the plan of tensor memory of each head dim, a line "HEAD_DIM ALLOCATED" and then the first
// column and the number of columns of scores, weights and output of each query tile; and the pairs
// of these three that are live at once, as "live A B".
#include <cstdio>
#include <initializer_list>

#include "sparse_fmha/sm100/tmem_plan.h"

using namespace sparse_fmha::sm100;

int main() {
  for (int head_dim = 16; head_dim <= 256; head_dim += 16) {
    TmemPlan const plan = tmem_plan(head_dim);
    std::printf("%d %d", head_dim, plan.allocated);
    for (int q = 0; q < plan.query_tiles; ++q) {
      for (Columns const& c : {plan.tiles[q].scores, plan.tiles[q].weights, plan.tiles[q].output}) {
        std::printf(" %d %d", c.first, c.count);
      }
    }
    std::printf("\n");
  }
  Lifetime const lives[] = {kScoresLive, kWeightsLive, kOutputLives};
  for (int a = 0; a < 3; ++a) {
    for (int b = 0; b < a; ++b) {
      if (live_at_once(lives[a], lives[b])) {
        std::printf("live %d %d\n", b, a);
      }
    }
  }
}
