#include "shapes.h"

#include <algorithm>
#include <stdexcept>

namespace sparse_fmha::bench {
namespace {

template <class Mechanism>
bool is(KernelInfo const& kernel) {
  return kernel.mechanism == Mechanism::kName;
}

}  // namespace

std::vector<Shape> shapes_of(KernelInfo const& kernel) {
  bool const cpu = kernel.key.arch == Arch::kCpu;
  if (is<Neighborhood>(kernel)) {
    int const side = cpu ? 64 : 128;
    std::vector<Shape> shapes;
    for (int window : {8, 16, 32}) {
      shapes.push_back({1, cpu ? 2 : 16, 64, {1, side, side}, {1, window, window}});
    }
    return shapes;
  }
  if (cpu) {
    return {{1, 2, 64, {1, 1, 1024}}, {1, 2, 64, {1, 1, 4096}}};
  }
  std::vector<Shape> shapes;
  for (int length : {4096, 8192, 16384, 32768}) {
    int const head_dim = kernel.key.head_dim;
    shapes.push_back({32768 / length, 2048 / head_dim, head_dim, {1, 1, length}});
  }
  return shapes;
}

Sparsity sparsity_of(KernelInfo const& kernel, Shape const& shape) {
  auto const length = static_cast<int32_t>(volume(shape.grid));
  if (is<Dense>(kernel)) {
    return Dense::Params{length, length};
  }
  if (is<Causal>(kernel)) {
    return Causal::Params{length, length};
  }
  if (is<Neighborhood>(kernel)) {
    return Neighborhood::Params{shape.grid, shape.window, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}};
  }
  throw std::logic_error("benchmarks/cpp/shapes.cpp has no shapes for " + kernel.mechanism);
}

double useful_flops(KernelInfo const& kernel, Shape const& shape) {
  double const length = static_cast<double>(volume(shape.grid));
  double pairs = length * length;
  if (is<Causal>(kernel)) {
    pairs = length * (length + 1) / 2;
  } else if (is<Neighborhood>(kernel)) {
    pairs = length * static_cast<double>(volume(shape.window));
  }
  int const dims = shape.head_dim + std::min(shape.head_dim, int{kernel.key.value_dim});
  return 2.0 * shape.batch * shape.heads * dims * pairs;
}

std::string to_string(Shape const& s) {
  std::string text = "b" + std::to_string(s.batch) + "_l" + std::to_string(volume(s.grid)) + "_h" +
                     std::to_string(s.heads) + "_d" + std::to_string(s.head_dim);
  if (s.window[2] > 0) {
    text += "_w" + std::to_string(s.window[1]) + "x" + std::to_string(s.window[2]);
  }
  return text;
}

int64_t element_bytes(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat16:
    case DataType::kBFloat16:
      return 2;
    case DataType::kFloat32:
      return 4;
    case DataType::kFloat64:
      return 8;
  }
  throw std::logic_error("a data type without a size");
}

}  // namespace sparse_fmha::bench
