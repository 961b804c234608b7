// Host code: workspace of a call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparse_fmha/core/registry.h"

namespace sparse_fmha::device {

// `count` elements, not initialised, for work on the call's stream.
template <class T>
T* allocate(ExecutionContext const& context, int64_t count) {
  return static_cast<T*>(context.memory->allocate(static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace sparse_fmha::device
