// The ops that merge attention over parts of the keys (sparse_fmha/core/merge.h).
#include "sparse_fmha/core/merge.h"

#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "placement.h"
#include "register.h"
#include "run.h"

namespace sparse_fmha {
namespace {

using torch::headeronly::ScalarType;
using Strides = int64_t[MergeProblem::kMostDims];

void check_part(size_t i, Tensor const& out, Tensor const& lse, Tensor const& first) {
  std::string const at = "[" + std::to_string(i) + "]";
  require(same_shape(out, first) && out.scalar_type() == first.scalar_type() &&
              on_one_device(out, first),
          "outs", at, " must have the shape, dtype and device of outs[0], ", shape_of(first), ", ",
          torch::headeronly::toString(first.scalar_type()), ", got ", shape_of(out), ", ",
          torch::headeronly::toString(out.scalar_type()));
  std::vector<int64_t> sizes = sizes_of(first);
  sizes.pop_back();
  require(sizes_of(lse) == sizes && on_one_device(lse, first), "lses", at,
          " must have the shape of outs[0] without its last dimension, and its device, got ",
          shape_of(lse));
  require(lse.scalar_type() == ScalarType::Float, "lses", at, " must have dtype float32, got ",
          torch::headeronly::toString(lse.scalar_type()));
}

// All strides of a problem, by which dimensions are joined where they can be.
std::vector<Strides*> strides_of(MergeProblem& p) {
  std::vector<Strides*> all = {&p.out_stride};
  for (int32_t i = 0; i < p.count; ++i) {
    all.push_back(&p.parts[i].out_stride);
    all.push_back(&p.parts[i].lse_stride);
  }
  return all;
}

// Fewer dimensions take fewer divisions.
void join_dims(MergeProblem& p) {
  std::vector<Strides*> const all = strides_of(p);
  int32_t kept = 0;
  for (int32_t d = 0; d < p.dims; ++d) {
    if (p.size[d] == 1) {
      continue;
    }
    bool joins = kept > 0;
    for (Strides* stride : all) {
      joins = joins && (*stride)[d] == (*stride)[kept - 1] * p.size[kept - 1];
    }
    if (joins) {
      p.size[kept - 1] *= p.size[d];
      continue;
    }
    p.size[kept] = p.size[d];
    for (Strides* stride : all) {
      (*stride)[kept] = (*stride)[d];
    }
    ++kept;
  }
  p.dims = kept;
}

// Dimensions 0 to rank - 2, the last one first.
void fill_strides(Strides& stride, Tensor const& t, int64_t rank) {
  for (int64_t d = 0; d + 1 < rank; ++d) {
    stride[d] = t.stride(rank - 2 - d);
  }
}

Tensor with_rows(Tensor const& out) {
  int64_t const last = out.dim() - 1;
  return out.size(last) <= 1 || out.stride(last) == 1 ? out : torch::stable::contiguous(out);
}

// Merges into `result`; returns lse.
Tensor merge_to(Tensor const& result, std::vector<Tensor> outs, std::vector<Tensor> const& lses) {
  int64_t const rank = result.dim();
  require(!outs.empty() && outs.size() == lses.size() && outs.size() <= MergeProblem::kMostParts,
          "outs and lses must have the same number of parts, from 1 to ", MergeProblem::kMostParts,
          ", got ", outs.size(), " and ", lses.size());
  require(rank >= 1 && rank <= MergeProblem::kMostDims + 1, "outs must have 1 to ",
          MergeProblem::kMostDims + 1, " dimensions, got shape ", shape_of(result));
  require(on_cpu(result) || on_gpu(result), "outs must be on cpu or cuda");
  std::vector<int64_t> sizes = sizes_of(result);
  int64_t const columns = sizes.back();
  sizes.pop_back();
  int64_t rows = 1;
  for (int64_t size : sizes) {
    rows = size == 0 ? 0 : rows * size;
    require(rows <= INT32_MAX, "outs must have at most 2^31 - 1 rows, got shape ",
            shape_of(result));
  }
  require(columns <= INT32_MAX / 2, "outs must have rows of at most 2^30 elements, got shape ",
          shape_of(result));
  MergeProblem p = {};
  p.dtype = data_type("outs", result);
  p.count = static_cast<int32_t>(outs.size());
  p.dims = static_cast<int32_t>(rank - 1);
  p.head_dim = static_cast<int32_t>(columns);
  for (int32_t d = 0; d < p.dims; ++d) {
    p.size[d] = static_cast<int32_t>(sizes[rank - 2 - d]);
  }
  p.out = result.data_ptr();
  fill_strides(p.out_stride, result, rank);
  for (size_t i = 0; i < outs.size(); ++i) {
    check_part(i, outs[i], lses[i], result);
    outs[i] = with_rows(outs[i]);
    p.parts[i].out = outs[i].data_ptr();
    p.parts[i].lse = static_cast<float const*>(lses[i].data_ptr());
    fill_strides(p.parts[i].out_stride, outs[i], rank);
    fill_strides(p.parts[i].lse_stride, lses[i], rank);
  }
  Tensor lse = new_tensor(result, sizes, ScalarType::Float);
  if (rows != 0) {
    p.lse = static_cast<float*>(lse.data_ptr());
    join_dims(p);
    Arch const arch = arch_of(result);
    DeviceScope const scope(result);
    Launch launch(result);
    merge_parts(arch, p, launch.context());
  }
  return lse;
}

std::tuple<Tensor, Tensor> merge(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  Tensor const out = new_tensor(outs[0], sizes_of(outs[0]), outs[0].scalar_type());
  Tensor lse = merge_to(out, std::move(outs), lses);
  return {out, std::move(lse)};
}

Tensor merge_into(Tensor first, std::vector<Tensor> others, std::vector<Tensor> lses) {
  int64_t const last = first.dim() - 1;
  require(last >= 0 && (first.size(last) <= 1 || first.stride(last) == 1),
          "first must have rows of consecutive elements, got shape ", shape_of(first));
  others.insert(others.begin(), first);
  return merge_to(first, std::move(others), lses);
}

}  // namespace

// outs: parts [.., D] of one shape; lses: fp32 [..], natural logs, -inf where a row has no keys in
// a part, which is not read there. Returns out, contiguous, and lse.
SPARSE_FMHA_OP(merge, "(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)")
// The same in the memory of the first part, which no other part overlaps.
SPARSE_FMHA_OP(merge_into, "(Tensor(a!) first, Tensor[] others, Tensor[] lses) -> Tensor lse")

}  // namespace sparse_fmha
