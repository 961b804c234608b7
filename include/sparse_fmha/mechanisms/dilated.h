// The mechanism of kernels for dilations that the copy engine does not stride over.
#pragma once

#include "sparse_fmha/mechanisms/neighborhood.h"

namespace sparse_fmha {

// Its boxes are found by maps of dilation classes (planning/class_boxes.h).
struct DilatedNeighborhood : Neighborhood {};

}  // namespace sparse_fmha
