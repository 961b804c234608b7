// The consumer of a worker of a decode kernel: the attention of its pieces.
#pragma once

#include <type_traits>

#include "sparse_fmha/device/decode/queries.h"
#include "sparse_fmha/device/decode/results.h"
#include "sparse_fmha/sm90/decode/walk.h"

namespace sparse_fmha::sm90 {

template <class Traits>
struct DecodeConsumer {
  using Element = typename Traits::Element;
  using Output = DecodeOutput<Traits>;
  using Walk = std::conditional_t<Traits::kVotes, VotingDecodeWalk<Traits>, DecodeWalk<Traits>>;

  DecodeParams const& params;
  DecodeWorker<Traits>& smem;
  int const worker;  // of the block
  Walk walk = {params, smem, worker};
  DecodeResults<Element> results = {params};

  __device__ __forceinline__ void attend(DecodePiece const& piece) {
    KeyRange const rows = params.keys.rows_of(piece.at.row_group);
    sync_consumer(worker);  // the products with the last queries are done
    load_decode_queries<Traits::kHeadDim>(params, piece.at, rows, smem.q, [](int row, int column) {
      return swizzled_place(row, column, 64);
    });
    cutlass::arch::fence_view_async_shared();
    sync_consumer(worker);
    Output output;
    cute::clear(output);
    OnlineSoftmax softmax(params.scale_log2);
    walk.run(piece, rows, softmax, output);
    results.store(piece, rows, softmax, output);
  }
};

}  // namespace sparse_fmha::sm90
