// How tokens and heads of SSA's choice are divided among thread blocks and warps.
#pragma once

#include "sparse_fmha/core/ssa_choices.h"

namespace sparse_fmha::device {

// A number whose divisions are shifts.
struct PowerOfTwo {
  int32_t log2;
  SPARSE_FMHA_HD int32_t value() const { return 1 << log2; }
  SPARSE_FMHA_HD int32_t divide(int32_t x) const { return x >> log2; }
  SPARSE_FMHA_HD int32_t rest(int32_t x) const { return x & (value() - 1); }
  // The least that is not below x.
  static PowerOfTwo from(int32_t x) {
    PowerOfTwo power = {0};
    while (power.value() < x) {
      ++power.log2;
    }
    return power;
  }
};

struct SsaParams {
  SsaChoices p;
  PowerOfTwo heads;  // of a token, in a warp's octets
  PowerOfTwo team;   // warps that share tokens
  int32_t tokens;    // of a team
  int32_t capacity;  // candidates of a token
  int32_t groups;    // of a batch entry and key head, one for each thread block

  SPARSE_FMHA_HD int32_t tokens_of(int32_t warps) const { return team.divide(warps) * tokens; }
};

// What a thread block, and a warp of it, works on.
struct SsaItem {
  int32_t entry;
  int32_t head_kv;
  int32_t first;  // token of the block
  int32_t count;  // tokens of the block
  int32_t warp;
  int32_t member;  // of the team
  int32_t token;   // the team's first one

  __device__ __forceinline__ SsaItem(SsaParams const& params) {
    SsaChoices const& p = params.p;
    int32_t const rest = blockIdx.x / params.groups;
    entry = rest / p.heads_kv;
    head_kv = rest % p.heads_kv;
    int32_t const tokens = params.tokens_of(blockDim.x / 32);
    // Those with the most keys come first.
    first = (params.groups - 1 - static_cast<int32_t>(blockIdx.x) % params.groups) * tokens;
    count = min_int(tokens, p.q_len - first);
    warp = threadIdx.x / 32;
    member = params.team.rest(warp);
    token = first + params.team.divide(warp) * params.tokens;
  }
  // Of an octet: this lane's token, and the head among those of the group.
  __device__ __forceinline__ int32_t token_of(SsaParams const& params, int octet) const {
    return token + params.heads.divide(octet) * 8 + static_cast<int32_t>(threadIdx.x) % 32 / 4;
  }
  __device__ __forceinline__ int32_t head_of(SsaParams const& params, int octet) const {
    return member * params.heads.value() + params.heads.rest(octet);
  }
};

}  // namespace sparse_fmha::device
