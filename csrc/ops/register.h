// Registration of an op with torch.
#pragma once

#include <torch/csrc/stable/library.h>

// Defines sparse_fmha::NAME with this schema. The function of the same name handles tensors of
// every device.
#define SPARSE_FMHA_OP(name, schema)                                                  \
  STABLE_TORCH_LIBRARY_FRAGMENT(sparse_fmha, m) { m.def(#name schema); }              \
  STABLE_TORCH_LIBRARY_IMPL(sparse_fmha, CPU, m) { m.impl(#name, TORCH_BOX(&name)); } \
  STABLE_TORCH_LIBRARY_IMPL(sparse_fmha, CUDA, m) { m.impl(#name, TORCH_BOX(&name)); }
