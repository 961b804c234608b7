#include "sparse_fmha/planning/class_boxes.h"

#include <numeric>
#include <variant>

#include "sparse_fmha/planning/tiling.h"

namespace sparse_fmha {

ClassMap class_map(TensorView const& view, Neighborhood::Params const& p, int32_t heads,
                   int32_t batch) {
  int64_t unit = 0;
  auto divide = [&](int64_t extent, int64_t stride) {
    unit = extent > 1 ? std::gcd(unit, stride) : unit;
  };
  divide(batch, view.batch_stride);
  divide(heads, view.head_stride);
  for (int axis = 0; axis < kGridAxes; ++axis) {
    divide(p.grid[axis], view.axis_stride[axis]);
  }
  constexpr int64_t kAny = 8;  // 16 bytes, of which the strides of maps are multiples
  unit = unit == 0 ? kAny : unit;

  ClassMap map{unit, 1, {}, true};
  auto reach = [&](int64_t last, int64_t stride) {
    int64_t const units = last > 0 ? stride / unit : 0;
    // Each factor below 2^31, so that the product does not overflow.
    map.fits &= units <= INT32_MAX && last <= INT32_MAX;
    map.extent += map.fits ? last * units : 0;
    map.fits &= map.extent <= INT32_MAX;
    return static_cast<int32_t>(map.fits ? units : 0);
  };
  map.units.batch = reach(batch - 1, view.batch_stride);
  map.units.head = reach(heads - 1, view.head_stride);
  for (int axis = 0; axis < kGridAxes; ++axis) {
    map.units.axis[axis] = reach(p.dilation[axis] - 1, view.axis_stride[axis]);
  }
  return map;
}

bool takes_class_boxes(FmhaProblem const& problem) {
  auto const* const windows = std::get_if<Neighborhood::Params>(&problem.sparsity);
  if (windows == nullptr || interleaved_launches(windows->grid, windows->dilation) == 1) {
    return false;
  }
  auto fits = [&](TensorView const& view, int32_t heads) {
    return class_map(view, *windows, heads, problem.batch).fits;
  };
  TensorView out;  // contiguous, and not there yet
  out.head_stride = problem.value_dim;
  int64_t stride = int64_t{problem.heads_q} * problem.value_dim;
  for (int axis = kGridAxes - 1; axis >= 0; --axis) {
    out.axis_stride[axis] = stride;
    stride *= problem.grid_q[axis];
  }
  out.batch_stride = stride;
  return fits(problem.q, problem.heads_q) && fits(problem.k, problem.heads_kv) &&
         fits(problem.v, problem.heads_kv) && fits(out, problem.heads_q);
}

}  // namespace sparse_fmha
