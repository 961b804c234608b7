// The op of SSA's choice of blocks (sparse_fmha/core/ssa_choices.h).
#include "sparse_fmha/core/ssa_choices.h"

#include <torch/headeronly/core/ScalarType.h>

#include "check.h"
#include "placement.h"
#include "register.h"
#include "run.h"
#include "sparse_fmha/device/ssa_choices.h"

namespace sparse_fmha {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kMost = 1 << 30;  // tokens

// Checks q and means, which may be replaced by copies, and describes them.
SsaChoices choices_of(Tensor& q, Tensor& means) {
  SsaChoices p;
  p.dtype = check_operand("q", q, 4);
  check_like_q("means", means, q);
  check_operand("means", means, 5);
  require(on_cpu(q) || p.dtype != DataType::kFloat64,
          "q must have dtype float16, bfloat16 or float32 on CUDA, got Double");
  require(means.size(1) == q.size(0) && means.size(4) == q.size(3), "means must have shape [any, ",
          q.size(0), ", any, any, ", q.size(3), "], got ", shape_of(means));
  check_groups(q.size(2), means.size(3), "means");
  p.batch = int_from(0, kMost, "the batch of q", q.size(0));
  p.q_len = int_from(0, kMost, "the length of q", q.size(1));
  p.heads_q = int_from(0, kMost, "the heads of q", q.size(2));
  p.heads_kv = static_cast<int32_t>(means.size(3));
  p.head_dim = static_cast<int32_t>(q.size(3));
  p.columns = int_from(0, kMost, "the blocks of means", means.size(2));
  p.parts = int_from(1, device::kMostSsaParts, "the parts of means", means.size(0));
  p.q = view(q);
  p.means = view(means);
  return p;
}

Tensor ssa_choices(Tensor q, Tensor means, int64_t block, int64_t at, int64_t few, double scale) {
  SsaChoices p = choices_of(q, means);
  p.block = int_from(1, kMost, "block", block);
  p.at = int_from(-kMost, kMost - 1, "at", at);
  p.few = int_from(0, on_cpu(q) ? kMost : device::kMostSsaBlocks, "few", few);
  p.scale = scale_of(scale, p.head_dim);
  Tensor chosen =
      new_tensor(q, {p.batch, p.heads_kv, p.q_len, int64_t{p.few} + 1}, ScalarType::Int);
  if (chosen.numel() != 0) {
    require(on_cpu(q) || p.group() <= device::kMostSsaGroup, "means must have a head for at most ",
            device::kMostSsaGroup, " heads of q on CUDA, got ", p.heads_kv, " for ", p.heads_q);
    p.chosen = static_cast<int32_t*>(chosen.data_ptr());
    DeviceScope const scope(q);
    Launch launch(q);
    choose_ssa_blocks(arch_of(q), p, launch.context());
  }
  return chosen;
}

}  // namespace

SPARSE_FMHA_OP(ssa_choices,
               "(Tensor q, Tensor means, int block, int at, int few, float scale) -> Tensor")

}  // namespace sparse_fmha
