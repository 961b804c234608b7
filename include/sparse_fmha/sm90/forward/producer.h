// The producer warps. One walks the key tiles and fills their stages. One per consumer loads its
// queries, so that no consumer waits for another to finish with its queries; the first of these
// also hands out query tiles, while the current tile is computed.
#pragma once

#include "sparse_fmha/sm90/common/cute.h"
#include "sparse_fmha/sm90/common/smem.h"
#include "sparse_fmha/sm90/forward/kernel_params.h"
#include "sparse_fmha/sm90/geometry/contract.h"

namespace sparse_fmha::sm90 {

template <class Traits, class Geometry, class Mechanism>
struct Producer {
  using Storage = SharedStorage<Traits, Geometry>;
  using Work = typename Geometry::Work;
  static constexpr int kStages = Traits::kStages;
  // Warps that read the work slot to load keys.
  static constexpr int kKeyWarps = kWarpLoads<Geometry> ? 2 : 1;
  static constexpr int kThreads =
      32 * (kKeyWarps + Geometry::kGatherWarps + kMaskWarps<Geometry>)+Traits::kConsumers - 1;
  // Warps that gather the rows of a stage. If there are twice as many, half of them gather the
  // values.
  static constexpr int kRowWarps = Geometry::kGatherWarps > 0 ? Traits::kTileK / 32 : 1;
  static_assert(Geometry::kGatherWarps <= kRowWarps ||
                    (Geometry::kGatherWarps == 2 * kRowWarps && !Traits::kKeysAhead),
                "warps for rows of keys and values, or for each of them");

  KernelParams<Geometry, Mechanism> const& params;
  Storage& smem;
  Geometry const geometry;

  // Run by a whole warp: loads the keys and values of each query tile.
  __device__ __forceinline__ void run_keys() {
    RingState<kStages> state;
    RingState<1> state_work;
    for (Work work; take_work(work, state_work); state_work.advance()) {
      load_keys(work, state);
    }
  }

  // Run by a whole warp, if each lane copies a box of a stage: loads the keys or the values.
  template <bool kValues>
  __device__ __forceinline__ void run_boxes() {
    RingState<kStages> state;
    RingState<1> state_work;
    bool const leads = threadIdx.x % 32 == 0;
    for (Work work; take_work(work, state_work); state_work.advance()) {
      auto boxes = geometry.boxes(work);
      CUTE_NO_UNROLL
      for (int i = 0; i < boxes.count; ++i) {
        // Nothing slow happens between a stage becoming free and its copy.
        auto const box = boxes.next(i);
        auto const source = geometry.source(work, box);
        uint32_t bytes = geometry.copied_bytes(source, kValues ? Traits::kBytesV : Traits::kBytesK);
        auto& ring = kValues ? smem.ring_v : smem.ring_k;
        auto& full = ring.full[state.index];
        if constexpr (!kValues) {
          geometry.publish(box, state);
          publish_biases(work, box, state);
        }
        ring.acquire(state);
        if constexpr (!kValues) {
          bytes += geometry.copy_bits(box, state, full);
        }
        if (leads) {
          ring.expect(state, bytes);
        }
        if constexpr (kValues) {
          geometry.load_v(full, values_of(state), source);
        } else {
          geometry.load_k(full, keys_of(state), source);
        }
        state.advance();
      }
    }
  }

  // Run by a whole warp, if rows are gathered: its share of the rows, in order of use.
  __device__ __forceinline__ void run_rows(int warp) {
    if constexpr (!Traits::kKeysAhead) {
      constexpr bool kShares = Geometry::kGatherWarps == 2 * kRowWarps;
      if (!kShares) {
        run_rows_of<true, true>(warp);
      } else if (warp < kRowWarps) {
        run_rows_of<true, false>(warp);
      } else {
        run_rows_of<false, true>(warp - kRowWarps);
      }
    } else {
      run_rows_ahead(warp);
    }
  }

  // Run by a whole warp: the masks of partial tiles, computed while copies run.
  __device__ __forceinline__ void run_masks() {
    RingState<kStages> state;
    RingState<1> state_work;
    for (Work work; take_work(work, state_work); state_work.advance()) {
      auto const masks = geometry.masks();
      auto boxes = geometry.boxes(work);
      masks.find_windows(work);
      CUTE_NO_UNROLL
      for (int i = 0; i < boxes.count; ++i) {
        // Before the stage is free: there are more masks and biases.
        if (i < work.num_partial || has_biases<Traits>(params)) {
          auto const box = boxes.next(i);
          if (i < work.num_partial) {
            masks.publish(box, state);
          }
          publish_biases(work, box, state);
        }
        smem.ring_k.acquire(state);
        smem.ring_k.full[state.index].arrive();
        state.advance();
      }
    }
  }

  // Run by one thread: hands out the query tiles and loads the first consumer's queries. If there
  // are lists to look through, run by a whole warp.
  __device__ __forceinline__ void run_work() {
    RingState<1> state;
    int32_t index = blockIdx.x;
    bool const leads = threadIdx.x % 32 == 0;
    while (true) {
      smem.work.put(state, [&](Work& work) {
        if (leads) {
          geometry.prepare(work, params.scheduler.decode(index), state);
        }
        if constexpr (kWarpLoads<Geometry>) {
          __syncwarp();
          if (work.tile.batch >= 0) {
            geometry.look_through(work, state);
          }
          __syncwarp();
        }
      });
      Work const& work = smem.work.work;  // left in shared memory: this thread has few registers
      if (work.tile.batch < 0) {
        return;
      }
      if (leads) {
        load_queries(work, 0, state);
        // Taken only when this query tile begins: a block that takes its next tile too early leaves
        // others idle at the end.
        index = params.scheduler.take(index);
      }
      if constexpr (kWarpLoads<Geometry>) {
        __syncwarp();  // all have read this tile before the next is prepared
      }
      state.advance();
    }
  }

  // Run by one thread: loads the queries of another consumer.
  __device__ __forceinline__ void run_queries(int consumer) {
    RingState<1> state;  // of the work and of the queries: both advance once per tile
    for (Work work; take_work(work, state); state.advance()) {
      load_queries(work, consumer, state);
    }
  }

 private:
  // Called by a whole warp before it acquires the stage of the box.
  template <class Box>
  __device__ __forceinline__ void publish_biases(Work const& work, Box const& box,
                                                 RingState<kStages> const& state) {
    if constexpr (Traits::kKeyBias) {
      if (has_biases<Traits>(params)) {
        smem.key_biases.template publish<Geometry>(
            params.bias, work.tile, state,
            [&](int w, int column) { return geometry.key_index(work, box, w, column); });
      }
    }
  }

  // Reads the current query tile; false if none is left.
  __device__ __forceinline__ bool take_work(Work& work, RingState<1> const& state) {
    work = smem.work.get(state);
    return work.tile.batch >= 0;
  }

  __device__ __forceinline__ void load_queries(Work const& work, int consumer,
                                               RingState<1> const& state) {
    auto& ring = smem.ring_q[consumer];
    ring.acquire(state);
    ring.expect(state, Traits::kQueryTensors * Traits::kBytesQ / Traits::kConsumers);
    geometry.load_q(ring.full[0], smem.q + consumer * 64 * 64, work, consumer);
  }

  // A consumer multiplies the next key tile before the current value tile.
  __device__ __forceinline__ void run_rows_ahead(int warp) {
    RingState<kStages> state;
    RingState<1> state_work;
    for (Work work; take_work(work, state_work); state_work.advance()) {
      auto rows = geometry.rows(work, warp);
      typename decltype(rows)::Key previous_key{};
      CUTE_NO_UNROLL
      for (int i = 0; i <= rows.count; ++i) {
        auto key = previous_key;
        if (i < rows.count) {
          key = rows.next(i);
          smem.ring_k.acquire(state);
          rows.gather_k(key, keys_of(state), smem.ring_k.full[state.index]);
        }
        if (i > 0) {
          auto previous = state;
          previous.retreat();
          smem.ring_v.acquire(previous);
          rows.gather_v(previous_key, values_of(previous), smem.ring_v.full[previous.index]);
        }
        previous_key = key;
        if (i < rows.count) {
          state.advance();
        }
      }
    }
  }

  // kKeys, kValues: which tensors to gather.
  template <bool kKeys, bool kValues>
  __device__ __forceinline__ void run_rows_of(int part) {
    RingState<kStages> state;
    RingState<1> state_work;
    for (Work work; take_work(work, state_work); state_work.advance()) {
      auto rows = geometry.rows(work, part);
      CUTE_NO_UNROLL
      for (int i = 0; i < rows.count; ++i) {
        auto const key = rows.next(i);
        if constexpr (kKeys) {
          smem.ring_k.acquire(state);
          rows.gather_k(key, keys_of(state), smem.ring_k.full[state.index]);
        }
        if constexpr (kValues) {
          smem.ring_v.acquire(state);
          rows.gather_v(key, values_of(state), smem.ring_v.full[state.index]);
        }
        state.advance();
      }
    }
  }

  // In order of use.
  __device__ __forceinline__ void load_keys(Work const& work, RingState<kStages>& state) {
    bool const leads = threadIdx.x % 32 == 0;
    auto boxes = geometry.boxes(work);
    if constexpr (!Traits::kKeysAhead) {
      CUTE_NO_UNROLL
      for (int i = 0; i < boxes.count; ++i) {
        auto const box = boxes.next(i);
        auto const source = geometry.source(work, box);
        if constexpr (kMaskWarps<Geometry> == 0) {  // otherwise the mask warp does it
          publish_biases(work, box, state);
        }
        smem.ring_k.acquire(state);
        if (leads) {
          geometry.publish(box, state);
          smem.ring_k.expect(state, Traits::kBytesK);
          geometry.load_k(smem.ring_k.full[state.index], keys_of(state), source);
        }
        smem.ring_v.acquire(state);
        if (leads) {
          smem.ring_v.expect(state, Traits::kBytesV);
          geometry.load_v(smem.ring_v.full[state.index], values_of(state), source);
        }
        state.advance();
      }
      return;
    }
    RingState<kStages> previous;
    typename Geometry::Source source{};
    CUTE_NO_UNROLL
    for (int i = 0; i <= boxes.count; ++i) {
      auto const previous_source = source;
      if (i < boxes.count) {
        // Nothing slow happens between a stage becoming free and its copy.
        auto const box = boxes.next(i);
        source = geometry.source(work, box);
        if constexpr (kMaskWarps<Geometry> == 0) {  // otherwise the mask warp does it
          publish_biases(work, box, state);
        }
        smem.ring_k.acquire(state);
        if (leads) {
          geometry.publish(box, state);
          smem.ring_k.expect(state, Traits::kBytesK);
          geometry.load_k(smem.ring_k.full[state.index], keys_of(state), source);
        }
      }
      if (i > 0) {
        smem.ring_v.acquire(previous);
        if (leads) {
          smem.ring_v.expect(previous, Traits::kBytesV);
          geometry.load_v(smem.ring_v.full[previous.index], values_of(previous), previous_source);
        }
      }
      previous = state;
      if (i < boxes.count) {
        state.advance();
      }
    }
  }

  __device__ __forceinline__ auto* keys_of(RingState<kStages> const& place) {
    return smem.k + place.index * Storage::kKeyElements;
  }
  __device__ __forceinline__ auto* values_of(RingState<kStages> const& place) {
    return smem.v + place.index * Storage::kValueElements;
  }
};

}  // namespace sparse_fmha::sm90
