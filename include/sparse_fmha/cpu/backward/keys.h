// Gradients of keys, values and extra tokens: a tile of them owns its sums, and all queries that
// see it pass by.
#pragma once

#include "sparse_fmha/cpu/backward/key_lanes.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

template <class M, class Element>
class KeyGradients : KeyLanes<M, Element> {
  using Base = KeyLanes<M, Element>;
  using Base::key_sums_, Base::value_sums_, Base::keys_wide_, Base::values_wide_, Base::head_;
  using Base::params_, Base::problem_, Base::plan_, Base::num_keys_, Base::tokens_;
  using typename Base::T;

 public:
  static size_t scratch_bytes(FmhaProblem const& problem, BackwardPlan const& plan) {
    typename M::Params const params{};
    Buffers buffers(nullptr);
    KeyGradients(problem, params, plan).place(buffers);
    return buffers.used();
  }
  static void run(FmhaProblem const& problem, void const* params, BackwardPlan const& plan,
                  int64_t item, void* scratch) {
    Buffers buffers(scratch);
    KeyGradients gradients(problem, *static_cast<typename M::Params const*>(params), plan);
    gradients.place(buffers);
    int32_t const tiles = plan.extra_tiles + plan.key_tiles;
    auto const tile = static_cast<int32_t>(item % tiles);
    auto const batch = static_cast<int32_t>(item / tiles / problem.heads_kv);
    auto const head_kv = static_cast<int32_t>(item / tiles % problem.heads_kv);
    if (tile < plan.extra_tiles) {
      gradients.extra_tile(batch, head_kv, tile);
    } else {
      gradients.key_tile(batch, head_kv, tile - plan.extra_tiles);
    }
  }

 private:
  KeyGradients(FmhaProblem const& problem, typename M::Params const& params,
               BackwardPlan const& plan)
      : Base(problem, params, plan) {}

  void extra_tile(int32_t batch, int32_t head_kv, int32_t tile) {
    this->select(batch, head_kv * this->group());
    int const most = static_cast<int>(volume(plan_.by_key.k));
    int32_t const first = tile * most;
    this->for_each_extra(first, most, this->biases_,
                         [&](int key, Element const* k, Element const* v) {
                           this->load_key(Coord{0, 0, first + key}, Coord{}, k, v);
                         });
    this->end_of_keys();
    this->for_each_head(batch, head_kv, [&] {
      if (this->has_bias()) {
        this->load_biases(/*extra=*/true);
      }
      for (int32_t i = 0; i < M::num_query_tiles(params_, plan_.by_key); ++i) {
        this->visit(M::query_tile(params_, plan_.by_key, i), false);
      }
    });
    store_all(problem_.gradients->extra_k, problem_.gradients->extra_v, head_kv);
  }

  void key_tile(int32_t batch, int32_t head_kv, int32_t tile) {
    this->select(batch, head_kv * this->group());
    KeyTile const keys = origin(tile);
    this->for_each_token(problem_.grid_kv, keys.residue, keys.origin, plan_.by_key.k,
                         [&](Coord const& position, Coord const& token) {
                           this->load_key(token, position, this->row_of(problem_.k, token, head_kv),
                                          this->row_of(problem_.v, token, head_kv));
                         });
    this->end_of_keys();
    this->for_each_head(batch, head_kv, [&] {
      if (this->has_bias()) {
        this->load_biases(/*extra=*/false);
      }
      visit_queries(keys, tile);
      if (this->sums_biases()) {
        store_bias_gradients();
      }
    });
    store_all(problem_.gradients->k, problem_.gradients->v, head_kv);
  }

  KeyTile origin(int32_t tile) const {
    if constexpr (M::kByLists) {
      return {{0, 0, 0}, {0, 0, tile * plan_.by_key.k[2]}};
    } else {
      return M::key_tile(params_, plan_.by_key, tile);
    }
  }

  void visit_queries(KeyTile const& keys, int32_t tile) {
    if constexpr (M::kByLists) {
      visit_listed(tile);
    } else {
      auto const walk = M::walk_transposed(params_, plan_.by_key, keys);
      for (int32_t i = 0; i < walk.num_partial + walk.num_full; ++i) {
        this->visit({keys.residue, walk.tile(i)}, i < walk.num_partial);
      }
    }
  }

  // The query blocks that list a block of keys.
  void visit_listed(int32_t block) {
    auto const& lists = plan_.lists;
    int64_t const* const offsets =
        lists.offsets + block + this->batch_ * lists.batch_stride + head_ * lists.head_stride;
    for (int64_t i = offsets[0]; i < offsets[1]; ++i) {
      auto const [query_block, place] = lists.entries[i];
      for (int lane = 0; lane < num_keys_; ++lane) {
        Coord position = tokens_[lane];
        position[0] = place;
        this->positions_.set(lane, position);
      }
      int32_t const first = query_block * params_.block_q;
      for (int32_t q = first; q < first + params_.block_q; q += plan_.by_key.q[2]) {
        bool const cut = tokens_[num_keys_ - 1][2] >= M::limit(params_, q);
        this->visit({{0, 0, 0}, {0, 0, q}}, place > 0 || cut);
      }
    }
  }

  void store_bias_gradients() {
    float* const gradient = this->bias_gradient();
    for (int lane = 0; lane < num_keys_; ++lane) {
      gradient[Base::index_in(problem_.grid_kv, tokens_[lane])] =
          static_cast<float>(this->bias_sums_[lane]);
    }
  }

  void store_all(TensorView const& k, TensorView const& v, int32_t head_kv) {
    for (int lane = 0; lane < num_keys_; ++lane) {
      auto const row = static_cast<int64_t>(lane);
      this->store(keys_wide_, k, tokens_[lane], head_kv, key_sums_ + row * keys_wide_.panel,
                  static_cast<T>(problem_.scale));
      this->store(values_wide_, v, tokens_[lane], head_kv, value_sums_ + row * values_wide_.panel,
                  T(1));
    }
  }
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
