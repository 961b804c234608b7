// Host code: the tensor maps of the copies of decode kernels.
#pragma once

#include <algorithm>

#include "sparse_fmha/cuda/tensor_map.h"
#include "sparse_fmha/device/decode/launch.h"
#include "sparse_fmha/planning/decode_sizes.h"
#include "sparse_fmha/sm90/decode/params.h"

namespace sparse_fmha::sm90 {

// Each line is read once: promotion to 256 bytes costs 3% of the bandwidth.
inline MapRows rows_of_boxes(DataType dtype) {
  return {dtype == DataType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                      : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
          2, 64, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B};
}

// What the call may read of keys and values.
inline double cache_bytes(FmhaProblem const& p) {
  DecodeKeys const& keys = *p.decode;
  double const heads = static_cast<double>(p.batch) * p.heads_kv * (keys.by_query ? keys.len_q : 1);
  return heads * static_cast<double>(std::min<int64_t>(most_slots(keys), keys.capacity)) *
         p.head_dim * 4;
}

// Fills in how keys are copied in tiles of `tile`: the boxes, their maps and a cache hint.
inline void describe_boxes(BoxedDecodeParams& params, FmhaProblem const& p, int32_t tile) {
  constexpr double kCacheBytes = 100e6;  // twice the L2 cache
  DecodeKeys const& keys = *p.decode;
  params.fits_cache = cache_bytes(p) <= kCacheBytes;
  params.box = decode_box(keys, tile);
  if (params.box > 0) {
    auto map = [&](TensorView const& of) {
      return make_tensor_map<3>(of.data, rows_of_boxes(p.dtype), p.head_dim,
                                {MapAxis{p.grid_kv[kGridAxes - 1], of.axis_stride[kGridAxes - 1],
                                         static_cast<uint32_t>(params.box)},
                                 MapAxis{p.heads_kv, of.head_stride},
                                 MapAxis{keys.page > 0 ? keys.pages : p.batch, of.batch_stride}});
    };
    params.k_map = map(p.k);
    params.v_map = map(p.v);
  }
}

}  // namespace sparse_fmha::sm90
