// Compiled once per instruction set, like attend_isa.cpp.
#include "sparse_fmha/core/config.h"
#undef SPARSE_FMHA_HD
#define SPARSE_FMHA_HD inline __attribute__((always_inline))

#include "sparse_fmha/cpu/backward/keys.h"
#include "sparse_fmha/cpu/backward/queries.h"
#include "sparse_fmha/cpu/backward/row_terms.h"
#include "sparse_fmha/cpu/backward/stripe_keys.h"
#include "sparse_fmha/cpu/isa.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {
namespace {

template <class Stage>
constexpr BackwardStage stage() {
  return {Stage::scratch_bytes, Stage::run};
}

template <class Element, class List>
struct ByMechanism;
template <class Element, class... M>
struct ByMechanism<Element, MechanismList<M...>> {
  static constexpr BackwardStages kStages[] = {{stage<RowTerms<M, Element>>(),
                                                stage<QueryGradients<M, Element>>(),
                                                stage<KeyGradients<M, Element>>()}...};
};

}  // namespace

BackwardStages backward(DataType dtype, size_t mechanism) {
  switch (dtype) {
    case DataType::kFloat16:
      return ByMechanism<Half, Mechanisms>::kStages[mechanism];
    case DataType::kBFloat16:
      return ByMechanism<BFloat16, Mechanisms>::kStages[mechanism];
    case DataType::kFloat32:
      return ByMechanism<float, Mechanisms>::kStages[mechanism];
    case DataType::kFloat64:
      return ByMechanism<double, Mechanisms>::kStages[mechanism];
  }
  return {};
}

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA
