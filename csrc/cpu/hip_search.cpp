// HiP's search on the CPU: a thread makes whole searches.
#include "sparse_fmha/core/hip_search.h"

#include <algorithm>
#include <vector>

#include "sparse_fmha/cpu/dispatch.h"
#include "sparse_fmha/cpu/hip_isa.h"
#include "sparse_fmha/cpu/kernel_rows.h"

namespace sparse_fmha {
namespace {

// A half of a chunk.
struct Candidate {
  KeyChunk chunk;
  double score;
};

// Keeps the n candidates with the largest scores, in order; of equal ones the first.
void keep_largest(std::vector<Candidate>& candidates, int32_t n) {
  if (candidates.size() > static_cast<size_t>(n)) {
    std::nth_element(candidates.begin(), candidates.begin() + n, candidates.end(),
                     [](Candidate const& a, Candidate const& b) {
                       return a.score != b.score ? a.score > b.score
                                                 : a.chunk.begin < b.chunk.begin;
                     });
    candidates.resize(n);
    std::sort(candidates.begin(), candidates.end(),
              [](Candidate const& a, Candidate const& b) { return a.chunk.begin < b.chunk.begin; });
  }
}

std::vector<Candidate> halves(std::vector<Candidate> const& chunks, int32_t granule) {
  std::vector<Candidate> found;
  found.reserve(2 * chunks.size());
  for (Candidate const& one : chunks) {
    for (int which = 0; which < 2; ++which) {
      KeyChunk const half = one.chunk.half(which, granule);
      if (half.size() > 0) {
        found.push_back({half, 0});
      }
    }
  }
  return found;
}

void search(HipSearch const& p, HipItem const& item, cpu::HipIsa const& isa, void* scratch) {
  std::vector<Candidate> chunks;
  for (int32_t c = 0; c < p.chunks; ++c) {
    KeyChunk const chunk = item.chunk(p, c);
    if (chunk.size() > 0) {
      chunks.push_back({chunk, 0});
    }
  }
  bool halved = true;
  std::vector<int32_t> positions;
  std::vector<double> scores;
  for (int32_t i = 0; i < p.halvings && halved; ++i) {
    std::vector<Candidate> candidates = halves(chunks, p.granule);
    halved = candidates.size() > chunks.size();
    positions.resize(candidates.size());
    scores.resize(candidates.size());
    std::transform(candidates.begin(), candidates.end(), positions.begin(),
                   [](Candidate const& one) { return one.chunk.middle(); });
    isa.scores(p, item, positions.data(), static_cast<int32_t>(positions.size()), scores.data(),
               scratch);
    chunks.clear();
    for (size_t j = 0; j < candidates.size(); ++j) {
      if (scores[j] > -__builtin_inf()) {  // nor NaN
        chunks.push_back({candidates[j].chunk, scores[j]});
      }
    }
    keep_largest(chunks, p.chunks);
  }
  int32_t* const to = p.columns + item.list(p) * p.width();
  int32_t count = 0;
  while (count < item.keys.begin) {
    to[count] = count;
    ++count;
  }
  for (Candidate const& one : chunks) {
    for (int32_t i = 0; i < min_int(one.chunk.size(), p.granule); ++i) {
      to[count++] = one.chunk.begin + i;
    }
  }
  p.counts[item.list(p)] = count;
  std::fill(to + count, to + p.width(), -1);
}

}  // namespace

void cpu_find_hip_keys(HipSearch const& p, ExecutionContext const& context) {
  cpu::HipIsa const isa = SPARSE_FMHA_BEST_ISA(hip(p.dtype));
  cpu::share(context, p.searches(), isa.scratch(p), [&](int64_t list, void* scratch) {
    int64_t const heads = list / p.groups();
    search(p,
           {p, static_cast<int32_t>(heads / p.heads_q), static_cast<int32_t>(heads % p.heads_q),
            static_cast<int32_t>(list % p.groups())},
           isa, scratch);
  });
}

}  // namespace sparse_fmha
