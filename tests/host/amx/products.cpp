// Both products of attention in tile registers, beside sums in fp64. Prints a line for each size:
// its name, the largest errors of scores and of outputs relative to the sums of magnitudes, and a
// checksum of all bits that the products found.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "sparse_fmha/core/cpu_isa.h"
#include "sparse_fmha/cpu/multiply.h"

namespace isa = sparse_fmha::cpu::SPARSE_FMHA_ISA;

namespace {

using Held = isa::Operands<isa::BFloat16>;
using Pair = isa::Pair;
constexpr int kLanes = isa::kPanel<float>;

// Memory at 64 bytes, all NaN, as what was not loaded may hold anything.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {
    std::memset(data_, 0xff, count * sizeof(T));
  }
  ~Buffer() { std::free(data_); }
  Buffer(Buffer const&) = delete;
  Buffer& operator=(Buffer const&) = delete;
  T* get() const { return data_; }

 private:
  T* const data_;
};

std::vector<isa::BFloat16> random_rows(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<isa::BFloat16> found(count);
  for (auto& x : found) {
    isa::narrow(normal(random), &x);
  }
  return found;
}

struct Checked {
  double worst = 0;
  uint64_t checksum = 0;

  void take(float found, double wanted, double magnitudes) {
    double const error = std::fabs(found - wanted) / magnitudes;
    worst = error <= worst ? worst : error;  // keeps NaN
    checksum = checksum * 1099511628211u + isa::to_bits(found);
  }
};

// scores[key][query] = keys * queries.
Checked scores(int keys, int queries, int dim, std::mt19937& random) {
  int const numbers = Held::numbers(dim);
  int const rows = isa::round_up(keys, isa::kPanelRows);
  auto const k = random_rows(int64_t{keys} * dim, random);
  auto const q = random_rows(int64_t{queries} * dim, random);
  Buffer<Pair> key_rows(int64_t{rows} * numbers), panel(int64_t{kLanes} * numbers);
  for (int key = 0; key < keys; ++key) {
    Held::load_row(&k[int64_t{key} * dim], dim, key_rows.get() + int64_t{key} * numbers);
  }
  for (int lane = 0; lane < queries; ++lane) {
    Held::load_lane(&q[int64_t{lane} * dim], dim, 1.f, panel.get() + lane);
  }
  Buffer<float> found(int64_t{rows} * kLanes);
  isa::multiply<false>(Held::rows(key_rows.get(), numbers), rows, panel.get(),
                       (queries + isa::kWidth<float> - 1) / isa::kWidth<float>, dim, found.get(),
                       kLanes);
  Checked checked;
  for (int key = 0; key < keys; ++key) {
    for (int lane = 0; lane < queries; ++lane) {
      double sum = 0, magnitudes = 0;
      for (int d = 0; d < dim; ++d) {
        double const product =
            double{isa::widen(k[int64_t{key} * dim + d])} * isa::widen(q[int64_t{lane} * dim + d]);
        sum += product;
        magnitudes += std::fabs(product);
      }
      checked.take(found.get()[int64_t{key} * kLanes + lane], sum, magnitudes);
    }
  }
  return checked;
}

// out[query][dim] = keep[query] * out[query][dim] + weights * values.
Checked outputs(int keys, int queries, int dim, std::mt19937& random) {
  int const rows = isa::round_up(keys, isa::kPanelRows);
  int const vectors = (queries + isa::kWidth<float> - 1) / isa::kWidth<float>;
  auto const v = random_rows(int64_t{keys} * dim, random);
  std::uniform_real_distribution<float> uniform;
  std::vector<float> weights(int64_t{keys} * queries), before(int64_t{queries} * dim);
  Buffer<float> panel(int64_t{rows} * kLanes), keep(kLanes), out(int64_t{kLanes} * kLanes);
  Buffer<Pair> values(int64_t{rows} / 2 * kLanes);
  for (int key = 0; key < keys; ++key) {
    for (int lane = 0; lane < queries; ++lane) {
      float const weight = uniform(random);
      isa::BFloat16 rounded;
      isa::narrow(weight, &rounded);
      weights[int64_t{key} * queries + lane] = isa::widen(rounded);
      panel.get()[key * kLanes + lane] = weight;
    }
    Held::load_summand(&v[int64_t{key} * dim], dim, key, values.get());
  }
  for (int lane = 0; lane < queries; ++lane) {
    keep.get()[lane] = uniform(random);
    for (int d = 0; d < dim; ++d) {
      out.get()[lane * kLanes + d] = before[int64_t{lane} * dim + d] = uniform(random);
    }
  }
  isa::multiply<true>(Held::as_weights(panel.get(), keys, vectors),
                      isa::round_up(queries, isa::kPanelRows), values.get(),
                      (dim + isa::kWidth<float> - 1) / isa::kWidth<float>, keys, out.get(), kLanes,
                      keep.get());
  Checked checked;
  for (int lane = 0; lane < queries; ++lane) {
    for (int d = 0; d < dim; ++d) {
      double sum = double{keep.get()[lane]} * before[int64_t{lane} * dim + d], magnitudes = sum;
      for (int key = 0; key < keys; ++key) {
        double const product =
            double{weights[int64_t{key} * queries + lane]} * isa::widen(v[int64_t{key} * dim + d]);
        sum += product;
        magnitudes += std::fabs(product);
      }
      checked.take(out.get()[lane * kLanes + d], sum, magnitudes);
    }
  }
  return checked;
}

}  // namespace

int main() {
  if (!sparse_fmha::takes_tiles()) {
    std::puts("no tiles");
    return 0;
  }
  std::mt19937 random(7);
  isa::TilesInUse const tiles;
  for (int keys : {1, 15, 31, 32, 33, 64, 81, 128}) {
    for (int queries : {1, 16, 17, 40, 64}) {
      for (int dim : {8, 24, 32, 40, 64}) {
        Checked const of_scores = scores(keys, queries, 4 * dim, random);
        Checked const of_outputs = outputs(keys, queries, dim, random);
        std::printf("%d,%d,%d %g %g %016llx\n", keys, queries, dim, of_scores.worst,
                    of_outputs.worst,
                    static_cast<unsigned long long>(of_scores.checksum ^ of_outputs.checksum));
      }
    }
  }
}
