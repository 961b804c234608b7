// Times every row of the kernel table through the same launch function that the ops call.
//
//   sparse_fmha_bench --benchmark_filter=sm90_dense_bfloat16_d128/.*l8192.*/cold
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <iostream>
#include <random>

#include "machine.h"
#include "shapes.h"
#include "sparse_fmha/cuda/device_arch.h"

namespace sparse_fmha::bench {
namespace {

// Bits of a normal number, cut off: the sign, exponent and first fraction bits.
uint16_t to_half(float x, DataType dtype) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (dtype == DataType::kBFloat16) {
    return static_cast<uint16_t>(bits >> 16);
  }
  uint32_t const magnitude = bits & 0x7fffffff;
  uint32_t const sign = bits >> 16 & 0x8000;
  constexpr uint32_t kSmallest = 113 << 23;  // 2^-14; smaller numbers become zero
  return static_cast<uint16_t>(magnitude < kSmallest ? sign
                                                     : sign | ((magnitude - (112 << 23)) >> 13));
}

template <class T>
void append(std::vector<char>& bytes, T value) {
  auto const* first = reinterpret_cast<char const*>(&value);
  bytes.insert(bytes.end(), first, first + sizeof value);
}

// Normally distributed numbers. The count has no factor in common with any row length, so
// repeating them gives no two rows that are equal in place.
std::vector<char> random_pattern(DataType dtype, unsigned seed) {
  constexpr int kCount = 1'000'003;
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<char> bytes;
  for (int i = 0; i < kCount; ++i) {
    float const x = normal(generator);
    switch (dtype) {
      case DataType::kFloat16:
      case DataType::kBFloat16:
        append(bytes, to_half(x, dtype));
        break;
      case DataType::kFloat32:
        append(bytes, x);
        break;
      case DataType::kFloat64:
        append(bytes, static_cast<double>(x));
        break;
    }
  }
  return bytes;
}

TensorView contiguous(void* data, Shape const& s) {
  int64_t const token = static_cast<int64_t>(s.heads) * s.head_dim;
  int64_t const x = s.grid[2];
  int64_t const y = s.grid[1];
  return {data, volume(s.grid) * token, {y * x * token, x * token, token}, s.head_dim};
}

FmhaProblem make_problem(Machine& machine, KernelInfo const& kernel, Shape const& s) {
  FmhaProblem p;
  p.dtype = kernel.key.dtype;
  p.batch = s.batch;
  p.heads_q = p.heads_kv = s.heads;
  p.head_dim = s.head_dim;
  p.value_dim = std::min(s.head_dim, kernel.key.value_dim);
  p.grid_q = p.grid_kv = s.grid;
  int64_t const bytes = s.elements() * element_bytes(p.dtype);
  unsigned seed = 0;
  for (TensorView* view : {&p.q, &p.k, &p.v, &p.out}) {
    *view = contiguous(machine.allocate(bytes, random_pattern(p.dtype, ++seed)), s);
  }
  p.lse = static_cast<float*>(machine.allocate(s.rows() * 4, std::vector<char>(4096)));
  p.scale = 1.0 / std::sqrt(s.head_dim);
  p.sparsity = sparsity_of(kernel, s);
  return p;
}

void run(benchmark::State& state, KernelRow const& row, Shape const& shape, bool cold) {
  KernelInfo const& kernel = row.info;
  try {
    auto const machine = kernel.key.arch == Arch::kCpu ? make_cpu() : make_cuda();
    FmhaProblem const problem = make_problem(*machine, kernel, shape);
    auto const launch = [&](ExecutionContext const& context) { row.launch(problem, context); };
    machine->time("warm-up", launch);
    for (auto _ : state) {
      if (cold) {
        machine->flush();
      } else {
        machine->run(launch);
      }
      state.SetIterationTime(machine->time(kernel.name.c_str(), launch));
    }
  } catch (std::exception const& error) {
    state.SkipWithError(error.what());
    return;
  }
  using benchmark::Counter;
  double const bytes =
      4.0 * shape.elements() * element_bytes(kernel.key.dtype) + 4.0 * shape.rows();
  state.counters["FLOP/s"] =
      Counter(useful_flops(kernel, shape), Counter::kIsIterationInvariantRate);
  state.counters["B/s"] = Counter(bytes, Counter::kIsIterationInvariantRate);
}

void register_all() {
  Arch gpu = Arch::kCpu;
  try {
    gpu = device_arch(0);
  } catch (std::exception const& error) {
    std::cerr << "no GPU rows: " << error.what() << "\n";
  }
  for (KernelRow const& row : kernel_table()) {
    KernelKey const& key = row.info.key;
    if (key.pass != Pass::kForward || (key.arch != Arch::kCpu && key.arch != gpu)) {
      continue;
    }
    for (Shape const& shape : shapes_of(row.info)) {
      for (bool cold : {true, false}) {
        std::string const name =
            row.info.name + "/" + to_string(shape) + (cold ? "/cold" : "/warm");
        benchmark::RegisterBenchmark(name.c_str(), run, row, shape, cold)
            ->UseManualTime()
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
}

}  // namespace
}  // namespace sparse_fmha::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 1;
  }
  sparse_fmha::bench::register_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
