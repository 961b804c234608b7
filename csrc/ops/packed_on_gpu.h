// Packed sequences on a GPU, all in one launch. The host does not read where they lie.
#pragma once

#include <optional>
#include <vector>

#include "packed.h"

namespace sparse_fmha {

// Throws not_implemented for what kernels of packed sequences lack.
void require_no_options(std::optional<Tensor> const& skip_threshold, double softcap);

// Returns out and lse.
std::vector<Tensor> packed_on_gpu(Packing const& packing, Tensor& q, Tensor& k, Tensor& v,
                                  bool causal, std::optional<double> scale);

}  // namespace sparse_fmha
