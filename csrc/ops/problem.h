// From tensors to the plain description of a problem.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <ostream>

#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

using torch::stable::Tensor;

// Checks q, k, v [B, *L, H, D] with `axes` token axes and describes all but the outputs and the
// sparsity. Throws with the argument's name, its value, and what is allowed. A CUDA tensor whose
// address or strides TMA does not support is replaced by a copy, here and below. The problem points
// into the arguments, so they must live until the launch.
FmhaProblem make_problem(Tensor& q, Tensor& k, Tensor& v, int axes, std::optional<double> scale);

// Adds extra_k, extra_v [B, N, Hkv, D] to a problem; both or neither.
void add_extra_tokens(FmhaProblem& problem, Tensor const& q, std::optional<Tensor>& extra_k,
                      std::optional<Tensor>& extra_v);

// The dtype of a tensor of floats; throws if it is another one.
DataType data_type(char const* name, Tensor const& t);

// Checks an operand that kernels read in its own dtype: a supported dtype, device and head dim,
// `rank` dimensions, and a readable layout.
DataType check_operand(char const* name, Tensor& t, int64_t rank);

// Checks what an operand must share with q, besides its shape.
void check_like_q(char const* name, Tensor const& t, Tensor const& q);

// Checks that k and v have a head for each group of q's heads.
void check_groups(int64_t heads_q, int64_t heads_kv, char const* kv = "k and v");

// The factor of q.k: what is given, which must be finite, or head_dim**-0.5.
double scale_of(std::optional<double> given, int64_t head_dim);

bool same_shape(Tensor const& a, Tensor const& b);

// Address and strides of a [B, *L, H, D] tensor.
TensorView view(Tensor const& tensor);

// Whether the data start at a multiple of `bytes`.
bool is_aligned(Tensor const& tensor, int64_t bytes);

bool on_one_device(Tensor const& a, Tensor const& b);

// A shape as text, made only if a message needs it.
struct ShapeText {
  Tensor const& tensor;
};
std::ostream& operator<<(std::ostream& out, ShapeText const& shape);
inline ShapeText shape_of(Tensor const& tensor) { return {tensor}; }

// The same for a device.
struct DeviceText {
  Tensor const& tensor;
};
std::ostream& operator<<(std::ostream& out, DeviceText const& device);
inline DeviceText device_of(Tensor const& tensor) { return {tensor}; }

}  // namespace sparse_fmha
