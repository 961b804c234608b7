#include "problem.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>

#include "check.h"
#include "placement.h"

namespace sparse_fmha {
using torch::headeronly::ScalarType;
using torch::headeronly::toString;

DataType data_type(char const* name, Tensor const& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return DataType::kFloat16;
    case ScalarType::BFloat16:
      return DataType::kBFloat16;
    case ScalarType::Float:
      return DataType::kFloat32;
    case ScalarType::Double:
      return DataType::kFloat64;
    default:
      break;
  }
  require(false, name, " must have dtype float16, bfloat16, float32 or float64, got ",
          toString(t.scalar_type()));
  return {};
}

namespace {

// TMA's requirements on addresses, in bytes, and on strides, in elements.
constexpr int64_t kAlignment = 16;
constexpr int64_t kStrideUnit = 8;

bool fits_copy_engine(Tensor const& t) {
  bool fits = is_aligned(t, kAlignment);
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    fits &= t.size(d) == 1 || t.stride(d) % kStrideUnit == 0;
  }
  return fits;
}

// Rejects a layout that no kernel reads, and copies what TMA or C++ cannot read in place. A copy
// has valid strides, since its head dim is a multiple of the unit.
void make_readable(char const* name, Tensor& t) {
  if (t.numel() == 0) {
    return;
  }
  int64_t const last = t.dim() - 1;
  require(t.size(last) == 1 || t.stride(last) == 1, name,
          " must have stride 1 in its last dimension, got ", t.stride(last));
  bool const fits = on_gpu(t) ? fits_copy_engine(t) : is_aligned(t, t.element_size());
  if (!fits) {
    t = torch::stable::clone(t);
  }
}

void check_head_dim(char const* name, int64_t dim) {
  require(dim >= 8 && dim <= 256 && dim % 8 == 0, "head dim of ", name,
          " must be a multiple of 8 from 8 to 256, got ", dim);
}

// Whether tensors have equal shapes but for the head dim.
bool same_tokens(Tensor const& a, Tensor const& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d + 1 < a.dim(); ++d) {
    same = a.size(d) == b.size(d);
  }
  return same;
}

int32_t narrow(char const* name, Tensor const& t, int64_t dim) {
  require(t.size(dim) <= INT32_MAX, name, " must have at most 2^31 - 1 entries in dimension ", dim,
          ", got ", t.size(dim));
  return static_cast<int32_t>(t.size(dim));
}

Coord grid_of(char const* name, Tensor const& t) {
  int64_t const axes = t.dim() - 3;
  Coord grid = {1, 1, 1};
  int64_t tokens = 1;
  for (int64_t a = 0; a < axes; ++a) {
    grid[kGridAxes - axes + a] = narrow(name, t, 1 + a);
    tokens *= t.size(1 + a);
    require(tokens <= INT32_MAX, name, " must have at most 2^31 - 1 tokens, got shape ",
            shape_of(t));
  }
  return grid;
}

}  // namespace

void check_groups(int64_t heads_q, int64_t heads_kv, char const* kv) {
  require(heads_kv > 0 ? heads_q % heads_kv == 0 : heads_q == 0,
          "heads of q must be a multiple of those of ", kv, ", got ", heads_q, " and ", heads_kv);
}

double scale_of(std::optional<double> given, int64_t head_dim) {
  double const scale = given.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  require(std::isfinite(scale), "scale must be a finite number, got ", scale);
  return scale;
}

bool same_shape(Tensor const& a, Tensor const& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) {
    same = a.size(d) == b.size(d);
  }
  return same;
}

void check_like_q(char const* name, Tensor const& t, Tensor const& q) {
  require(t.scalar_type() == q.scalar_type(), name, " must have q's dtype, ",
          toString(q.scalar_type()), ", got ", toString(t.scalar_type()));
  require(on_one_device(t, q), name, " must be on q's device, ", device_of(q), ", got ",
          device_of(t));
}

DataType check_operand(char const* name, Tensor& t, int64_t rank) {
  require(t.dim() == rank, name, " must have ", rank, " dimensions, got shape ", shape_of(t));
  require(on_cpu(t) || on_gpu(t), name, " must be on cpu or cuda");
  DataType const dtype = data_type(name, t);
  check_head_dim(name, t.size(rank - 1));
  make_readable(name, t);
  return dtype;
}

TensorView view(Tensor const& t) {
  int64_t const axes = t.dim() - 3;
  TensorView result;
  result.data = t.data_ptr();
  result.batch_stride = t.stride(0);
  result.head_stride = t.stride(1 + axes);
  for (int64_t a = 0; a < axes; ++a) {
    result.axis_stride[kGridAxes - axes + a] = t.stride(1 + a);
  }
  return result;
}

bool is_aligned(Tensor const& tensor, int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(tensor.data_ptr()) % bytes == 0;
}

bool on_one_device(Tensor const& a, Tensor const& b) {
  return on_cpu(a) == on_cpu(b) && on_gpu(a) == on_gpu(b) && (!on_gpu(a) || gpu_of(a) == gpu_of(b));
}

std::ostream& operator<<(std::ostream& out, ShapeText const& shape) {
  out << "[";
  for (int64_t d = 0; d < shape.tensor.dim(); ++d) {
    out << (d == 0 ? "" : ", ") << shape.tensor.size(d);
  }
  return out << "]";
}

std::ostream& operator<<(std::ostream& out, DeviceText const& device) {
  Tensor const& t = device.tensor;
  if (on_gpu(t)) {
    return out << "cuda:" << gpu_of(t);
  }
  return out << (on_cpu(t) ? "cpu" : "another device");
}

FmhaProblem make_problem(Tensor& q, Tensor& k, Tensor& v, int axes, std::optional<double> scale) {
  int64_t const rank = axes + 3;
  int64_t const heads = rank - 2;
  struct {
    char const* name;
    Tensor& tensor;
  } const operands[] = {{"q", q}, {"k", k}, {"v", v}};
  for (auto const& [name, t] : operands) {
    require(t.dim() == rank, name, " must have ", rank, " dimensions (batch, ", axes,
            " of tokens, heads, head dim), got shape ", shape_of(t));
  }
  require(on_cpu(q) || on_gpu(q), "q must be on cpu or cuda");
  FmhaProblem p;
  p.dtype = data_type("q", q);
  for (auto const& [name, t] : operands) {
    check_like_q(name, t, q);
    require(t.size(0) == q.size(0), name, " must have q's batch, ", q.size(0), ", got ", t.size(0));
  }
  int64_t const dim = q.size(rank - 1);
  int64_t const value_dim = v.size(rank - 1);
  require(k.size(rank - 1) == dim, "k must have q's head dim, ", dim, ", got ", k.size(rank - 1));
  require(same_tokens(k, v), "v must have k's shape but for the head dim, ", shape_of(k), ", got ",
          shape_of(v));
  check_head_dim("q", dim);
  check_head_dim("v", value_dim);
  for (auto const& [name, t] : operands) {
    make_readable(name, t);
  }
  int64_t const heads_q = q.size(heads);
  int64_t const heads_kv = k.size(heads);
  check_groups(heads_q, heads_kv);
  p.scale = scale_of(scale, dim);

  p.batch = narrow("q", q, 0);
  p.heads_q = narrow("q", q, heads);
  p.heads_kv = narrow("k", k, heads);
  p.head_dim = static_cast<int32_t>(dim);
  p.value_dim = static_cast<int32_t>(value_dim);
  p.grid_q = grid_of("q", q);
  p.grid_kv = grid_of("k", k);
  p.q = view(q);
  p.k = view(k);
  p.v = view(v);
  return p;
}

void add_extra_tokens(FmhaProblem& problem, Tensor const& q, std::optional<Tensor>& extra_k,
                      std::optional<Tensor>& extra_v) {
  require(extra_k.has_value() == extra_v.has_value(), "extra_", extra_k ? "v" : "k",
          " must be given with extra_", extra_k ? "k" : "v", ", got only the latter");
  if (!extra_k) {
    return;
  }
  struct {
    char const* name;
    Tensor& tensor;
    int32_t dim;
  } const operands[] = {{"extra_k", *extra_k, problem.head_dim},
                        {"extra_v", *extra_v, problem.value_dim}};
  for (auto const& [name, t, dim] : operands) {
    require(t.dim() == 4 && t.size(0) == problem.batch && t.size(2) == problem.heads_kv &&
                t.size(3) == dim,
            name, " must have shape [", problem.batch, ", any, ", problem.heads_kv, ", ", dim,
            "], got ", shape_of(t));
    check_like_q(name, t, q);
    make_readable(name, t);
  }
  require(extra_k->size(1) == extra_v->size(1), "extra_v must have the ", extra_k->size(1),
          " tokens of extra_k, got ", extra_v->size(1));
  problem.extra_len = narrow("extra_k", *extra_k, 1);
  problem.extra_k = view(*extra_k);
  problem.extra_v = view(*extra_v);
}

}  // namespace sparse_fmha
