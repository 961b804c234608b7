// The tree search of HiP attention (Lee et al. 2024, arXiv:2406.09827) as plain data.
// python/sparse_fmha/patterns/hip.py defines it.
#pragma once

#include "sparse_fmha/core/arch.h"
#include "sparse_fmha/core/decode.h"
#include "sparse_fmha/core/problem.h"

namespace sparse_fmha {

struct ExecutionContext;  // registry.h

// Neighboring keys.
struct KeyChunk {
  int32_t begin;
  int32_t end;

  SPARSE_FMHA_HD int32_t size() const { return end - begin; }
  // Its score is that of this key.
  SPARSE_FMHA_HD int32_t middle() const { return begin + size() / 2; }
  // The first half, which has the odd key, or the second one, which is empty if the chunk has at
  // most `granule` keys.
  SPARSE_FMHA_HD KeyChunk half(int32_t which, int32_t granule) const {
    int32_t const cut = size() > granule ? begin + (size() + 1) / 2 : end;
    return which == 0 ? KeyChunk{begin, cut} : KeyChunk{cut, end};
  }
};

// One search for each head of q and each group of block_q queries of a batch entry. A row of a
// result has the first min(first, begin) keys and those of the chunks found between these and
// `begin`, ascending, then -1.
struct HipSearch {
  DataType dtype;
  int32_t batch;
  int32_t heads_q;  // a multiple of heads_kv
  int32_t heads_kv;
  int32_t head_dim;
  int32_t q_len;
  int32_t block_q;
  int32_t sample;  // every sample-th query of a group counts
  TensorView q;
  TensorView k;       // [B, page, heads_kv, D], or pages in place of batch entries
  int32_t page;       // rows of a batch entry, or of a page
  int32_t num_pages;  // first size of k
  IndexTable table;   // of pages; data is nullptr without
  int32_t const* begin;
  int64_t begin_stride;  // between batch entries
  int32_t chunks;        // at most that many are kept
  int32_t granule;       // chunks with at most that many keys are not halved
  int32_t first;
  int32_t halvings;
  int32_t* columns;  // [B, heads_q, groups, width]
  int32_t* counts;   // [B, heads_q, groups]

  SPARSE_FMHA_HD int32_t groups() const { return ceil_div(q_len, block_q); }
  SPARSE_FMHA_HD int32_t width() const { return first + chunks * granule; }
  SPARSE_FMHA_HD int64_t searches() const { return int64_t{batch} * heads_q * groups(); }
  // Of a batch entry.
  SPARSE_FMHA_HD int32_t capacity() const {
    return table.data == nullptr ? page : page * table.width;
  }
  // The sampled queries of a group.
  SPARSE_FMHA_HD int32_t rows(int32_t group) const {
    return ceil_div(min_int(block_q, q_len - group * block_q), sample);
  }
};

// The search of one head and group.
struct HipItem {
  int32_t batch;
  int32_t head;
  int32_t group;
  int32_t head_kv;
  KeyChunk keys;  // those that are searched

  SPARSE_FMHA_HD HipItem(HipSearch const& p, int32_t batch, int32_t head, int32_t group)
      : batch(batch), head(head), group(group), head_kv(head / (p.heads_q / p.heads_kv)) {
    int32_t const given = p.begin[batch * p.begin_stride + group];
    keys.end = max_int(0, min_int(given, p.capacity()));
    keys.begin = min_int(p.first, keys.end);
  }
  // The c-th chunk that the search starts from.
  SPARSE_FMHA_HD KeyChunk chunk(HipSearch const& p, int32_t c) const {
    int64_t const size = keys.size();
    return {keys.begin + static_cast<int32_t>(size * c / p.chunks),
            keys.begin + static_cast<int32_t>(size * (c + 1) / p.chunks)};
  }
  SPARSE_FMHA_HD int64_t list(HipSearch const& p) const {
    return (int64_t{batch} * p.heads_q + head) * p.groups() + group;
  }
  // The r-th sampled query.
  template <class Element>
  SPARSE_FMHA_HD Element const* query(HipSearch const& p, int32_t r) const {
    int64_t const token = int64_t{group} * p.block_q + int64_t{r} * p.sample;
    return static_cast<Element const*>(p.q.data) + batch * p.q.batch_stride +
           token * p.q.axis_stride[kGridAxes - 1] + head * p.q.head_stride;
  }
  // nullptr if the key is on a page that does not exist.
  template <class Element>
  SPARSE_FMHA_HD Element const* key(HipSearch const& p, int32_t position) const {
    int32_t entry = batch;
    if (p.table.data != nullptr) {
      entry = p.table.at(batch, 0, head_kv, position / p.page);
      position %= p.page;
      if (entry < 0 || entry >= p.num_pages) {
        return nullptr;
      }
    }
    return static_cast<Element const*>(p.k.data) + entry * p.k.batch_stride +
           position * p.k.axis_stride[kGridAxes - 1] + head_kv * p.k.head_stride;
  }
};

// Throws std::runtime_error if this build has no kernel for the architecture.
void find_hip_keys(Arch arch, HipSearch const& search, ExecutionContext const& context);

}  // namespace sparse_fmha
