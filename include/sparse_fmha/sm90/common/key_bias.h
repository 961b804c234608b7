// Biases of the keys in stages. A producer warp writes those of a stage, and consumers add them to
// the stage's scores.
#pragma once

#include "sparse_fmha/core/problem.h"
#include "sparse_fmha/device/accumulator.h"
#include "sparse_fmha/device/scheduler.h"
#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/this_consumer.h"

namespace sparse_fmha::sm90 {

struct BiasParams {
  TokenNumbers keys;
  int64_t axis_stride[kGridAxes];  // from a key of a grid to the next on each axis
  TokenNumbers rows;               // a row sees no key with a smaller bias; no data: it sees all
};

// Whether the keys of a call have biases, which are 0 if it has only a soft cap. Kernels of
// backward passes also run without.
template <class Traits, class Params>
__device__ __forceinline__ bool has_biases(Params const& params) {
  return Traits::kKeyBias &&
         (!Traits::kBiasOptional || params.bias.keys.data != nullptr || params.soft_cap.given());
}

// Finite biases stay finite.
inline __device__ float bias_in_log2(float bias) {
  constexpr float kLog2e = 1.44269504088896340736f;
  constexpr float kLargest = 3e38f;
  float const x = bias * kLog2e;
  return fabsf(bias) < INFINITY ? fminf(fmaxf(x, -kLargest), kLargest) : x;
}

// The thresholds of a thread's rows, for geometries that have them.
template <class Geometry>
struct RowThresholds {
  using Work = typename Geometry::Work;

  BiasParams const& params;
  Geometry const& geometry;
  Work const& work;

  __device__ __forceinline__ bool given() const {
    return Geometry::kRowThresholds && params.rows.data != nullptr;
  }
  // That of the thread's r-th row, or of the last one of the tensor.
  __device__ __forceinline__ float operator()(int r) const {
    if constexpr (Geometry::kRowThresholds) {
      int const row = AccumulatorPosition().row + 8 * r;
      return __ldg(params.rows.data + work.tile.batch * params.rows.batch_stride +
                   work.tile.head * params.rows.head_stride +
                   geometry.query(work, this_consumer(), row));
    } else {
      return -INFINITY;
    }
  }
};

// What biases of -inf leave of the keys of a stage.
enum class KeysShown : int32_t { kNone, kSome, kAll };

// A member of a block's shared memory; empty if the kernel takes no bias.
template <class Traits, bool = Traits::kKeyBias>
struct KeyBiases {};

template <class Traits>
struct KeyBiases<Traits, true> {
  // Twice as many as stages: one is written while its stage is still in use.
  static constexpr int kSlots = 2 * Traits::kStages;
  static constexpr int kRounds = (Traits::kTileK + 31) / 32;
  static_assert(Traits::kStages >= 2, "a slot is read until the next stage is released");

  // The branches between parts keep ptxas from loading all biases at once, for which threads with
  // large heads, or with two tiles of products, have no registers.
  static constexpr int kParts =
      Traits::kHeadDim > 128 || Traits::kBiasOptional ? Traits::kTileK / 16 : 1;

  // In log2 units; as they are given if rows have thresholds, with which they are compared.
  alignas(16) float biases[kSlots][Traits::kTileK];
  KeysShown shown[kSlots];

  // Called by a whole warp, before it acquires the stage at `place`. index_of(w, column): the index
  // of the key in a column, 32 * w + lane, among those of its head; negative if there is none.
  template <class Geometry, class Place, class IndexOf>
  __device__ __forceinline__ void publish(BiasParams const& params, WorkTile const& tile,
                                          Place const& place, IndexOf index_of) {
    bool const as_given = Geometry::kRowThresholds && params.rows.data != nullptr;
    float const* const from = params.keys.data + tile.batch * params.keys.batch_stride +
                              tile.head * params.keys.head_stride;
    int const lane = threadIdx.x % 32;
    float bias[kRounds];
    CUTE_UNROLL
    for (int w = 0; w < kRounds; ++w) {
      int const column = w * 32 + lane;
      int64_t const index = index_of(w, column);
      bool const has_bias = params.keys.data != nullptr && column < Traits::kTileK && index >= 0;
      bias[w] = has_bias ? __ldg(from + index) : 0.f;
    }
    bool hides = false;
    bool shows = false;
    CUTE_UNROLL
    for (int w = 0; w < kRounds; ++w) {
      int const column = w * 32 + lane;
      if (column < Traits::kTileK) {
        hides |= bias[w] == -INFINITY;
        shows |= bias[w] != -INFINITY;
        biases[slot(place)][column] = as_given ? bias[w] : bias_in_log2(bias[w]);
      }
    }
    hides = __any_sync(0xffffffff, hides);
    shows = __any_sync(0xffffffff, shows);
    if (lane == 0) {
      shown[slot(place)] = !hides ? KeysShown::kAll : shows ? KeysShown::kSome : KeysShown::kNone;
    }
    __syncwarp();
    asm volatile("" ::: "memory");
  }

  // Called by a consumer warp until it releases the next stage. Replaces scores by `scale_log2`
  // times the score plus the bias of the key, or -inf if that hides the key, whatever the score.
  template <class Scores, class Place, class Geometry>
  __device__ __forceinline__ KeysShown add(Scores& s, Place const& place, float scale_log2,
                                           RowThresholds<Geometry> const& thresholds) const {
    asm volatile("" ::: "memory");
    float const* const from = biases[slot(place)] + AccumulatorPosition().column;
    KeysShown const result = shown[slot(place)];
    if (thresholds.given()) {
      add_above(s, from, scale_log2, {thresholds(0), thresholds(1)});
      __syncwarp();
      return result;
    }
    auto hide = [&](int part, float to) {
      if (result != KeysShown::kAll) {
        visit(s, part, from, [&](float& score, float bias, int /*row*/) {
          score = bias == -INFINITY ? to : score;
        });
      }
    };
    CUTE_UNROLL
    for (int part = 0; part < kParts; ++part) {
      if (kParts == 1) {
        hide(part, 0.f);  // before the sums, which ptxas can then move among the exponentials
      }
      visit(s, part, from,
            [&](float& score, float bias, int /*row*/) { score = fmaf(score, scale_log2, bias); });
      if (kParts > 1) {
        hide(part, -INFINITY);
      }
    }
    __syncwarp();  // one lane releases the next stage for all
    return result;
  }

 private:
  // The same where a row also sees no key whose bias is below its threshold.
  template <class Scores>
  static __device__ __forceinline__ void add_above(Scores& s, float const* from, float scale_log2,
                                                   float2 thresholds) {
    CUTE_UNROLL
    for (int part = 0; part < kParts; ++part) {
      visit(s, part, from, [&](float& score, float bias, int row) {
        bool const sees = bias >= (row == 0 ? thresholds.x : thresholds.y) && bias != -INFINITY;
        float const sum = fmaf(score, scale_log2, bias_in_log2(bias));
        score = sees ? sum : -INFINITY;
      });
    }
  }

  // Calls body(score, bias, row) for a part of the scores; `row` is one of the thread's two. The
  // loads are volatile, so that no biases are kept from one call to the next: registers
  // are scarce.
  template <class Scores, class Body>
  static __device__ __forceinline__ void visit(Scores& s, int part, float const* from, Body body) {
    constexpr int kScores = Traits::kTileK / 2 / kParts;
    uint32_t const address = cute::cast_smem_ptr_to_uint(from);
    CUTE_UNROLL
    for (int i = part * kScores; i < (part + 1) * kScores; i += 4) {
      float bias[2];
      asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(bias[0]), "=f"(bias[1])
                   : "r"(address + 4 * AccumulatorPosition::column_of(i)));
      CUTE_UNROLL
      for (int j = i; j < i + 4; ++j) {
        body(s(j), bias[j % 2], AccumulatorPosition::row_of(j));
      }
    }
  }
  template <class Place>
  static __device__ __forceinline__ int slot(Place const& place) {
    return static_cast<int>(place.phase) * Traits::kStages + place.index;
  }
};

}  // namespace sparse_fmha::sm90
