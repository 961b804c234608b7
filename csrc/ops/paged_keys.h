// Keys and values in pages.
#pragma once

#include <memory>
#include <vector>

#include "packed.h"

namespace sparse_fmha {

// Contiguous copies of the keys and values of one sequence. A key whose page does not exist is not
// visible.
class PagedKeys {
 public:
  // k, v: [pages, page, Hkv, D] with any strides; table: int32 [B, pages of a sequence].
  PagedKeys(Tensor const& k, Tensor const& v, Tensor const& table, PackedSequence const& sequence);

  // Lets the problem of the sequence read the copies, which live as long as this object.
  void use_in(FmhaProblem& problem, bool causal);

 private:
  void copy_page(Tensor const& from, int64_t page, int64_t rows, char* to) const;

  int64_t const heads_;
  int64_t const head_dim_;
  std::unique_ptr<char[]> k_;
  std::unique_ptr<char[]> v_;
  std::vector<int32_t> keys_;  // the positions whose pages exist
  int32_t count_ = 0;
};

}  // namespace sparse_fmha
