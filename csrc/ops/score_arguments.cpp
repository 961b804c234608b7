#include "score_arguments.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "check.h"
#include "list_arguments.h"

namespace sparse_fmha {
namespace {

TokenNumbers numbers_of(char const* name, Tensor& t, int64_t tokens, FmhaProblem const& problem,
                        Tensor const& q) {
  require(t.scalar_type() == ScalarType::Float, name, " must have dtype float32, got ",
          torch::headeronly::toString(t.scalar_type()));
  require(t.dim() == 3 && t.size(2) == tokens, name, " must have shape [", problem.batch, " or 1, ",
          problem.heads_q, " or 1, ", tokens, "], batch, query heads and tokens, got ",
          shape_of(t));
  check_shared(name, "batch", t.size(0), problem.batch);
  check_shared(name, "head", t.size(1), problem.heads_q);
  require(on_one_device(t, q), name, " must be on q's device, ", device_of(q), ", got ",
          device_of(t));
  if (t.numel() != 0 && t.size(2) != 1 && t.stride(2) != 1) {
    t = torch::stable::contiguous(t);
  }
  if (t.numel() != 0 && !is_aligned(t, sizeof(float))) {
    t = torch::stable::clone(t);
  }
  static float const nowhere = 0;  // an empty tensor may have no address
  TokenNumbers numbers;
  numbers.data = t.numel() == 0 ? &nowhere : static_cast<float const*>(t.data_ptr());
  numbers.batch_stride = t.size(0) == 1 ? 0 : t.stride(0);
  numbers.head_stride = t.size(1) == 1 ? 0 : t.stride(1);
  return numbers;
}

}  // namespace

void add_softcap(FmhaProblem& problem, double softcap) {
  require(std::isfinite(softcap) && softcap >= 0, "softcap must be finite and at least 0, got ",
          softcap);
  problem.softcap = softcap;
}

void add_key_bias(FmhaProblem& problem, Tensor const& q, std::optional<Tensor>& key_bias) {
  if (key_bias) {
    problem.key_bias = numbers_of("key_bias", *key_bias, volume(problem.grid_kv), problem, q);
  }
}

void add_row_threshold(FmhaProblem& problem, Tensor const& q,
                       std::optional<Tensor>& row_threshold) {
  if (row_threshold) {
    require(problem.key_bias.data != nullptr,
            "key_bias must be given with row_threshold, got only the latter");
    problem.row_threshold =
        numbers_of("row_threshold", *row_threshold, volume(problem.grid_q), problem, q);
  }
}

}  // namespace sparse_fmha
