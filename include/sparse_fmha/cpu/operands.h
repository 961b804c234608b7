// How the operands of matrix products are held: in the compute type; see pairs.h and amx/operands.h
// for pairs of bf16.
#pragma once

#include "sparse_fmha/cpu/element.h"

namespace sparse_fmha::cpu::SPARSE_FMHA_ISA {

// Steps of a sum in one number of an operand.
template <class In>
inline constexpr int kSteps = 1;

// A matrix whose number (row, step) is data[row * row_stride + step * step_stride].
template <class In>
struct Factor {
  In const* data;
  int64_t row_stride;
  int64_t step_stride;
};

// sum + x * row, for each lane.
template <class T>
inline Vector<T> add_product(Vector<T> sum, T x, T const* row) {
  return sum + x * *reinterpret_cast<Vector<T> const*>(row);
}

// Operands of products of rows of elements. `In` is a number of an operand.
template <class Element>
struct Operands {
  using T = typename ComputeOf<Element>::type;
  using In = T;
  using Left = Factor<In>;  // the left operand of a product

  // Numbers of a row, along the head dim.
  static constexpr int numbers(int dim) { return dim; }
  static Left rows(In const* data, int numbers) { return {data, numbers, 1}; }
  // A row, along the steps of a sum.
  static void load_row(Element const* from, int count, In* to) { widen_row(from, count, to); }
  // The same times a factor, in one lane of a panel.
  static void load_lane(Element const* from, int count, T factor, In* to) {
    for (int i = 0; i < count; ++i) {
      to[i * kPanel<T>] = widen(from[i]) * factor;
    }
  }
  // A row of a panel whose rows are summed. Rows are loaded in order.
  static void load_summand(Element const* from, int count, int row, In* panel) {
    widen_row(from, count, panel + row * kPanel<T>);
  }
  static T at(In const* row, int i) { return row[i]; }
  // A panel of `vectors` vectors, whose rows are summed, transposed. May overwrite it.
  static Left as_weights(T* panel, int /*rows*/, int /*vectors*/) { return {panel, 1, kPanel<T>}; }
};

}  // namespace sparse_fmha::cpu::SPARSE_FMHA_ISA

#if defined(SPARSE_FMHA_TILE_REGISTERS)
#include "sparse_fmha/cpu/amx/operands.h"
#elif defined(__AVX512BF16__)
#include "sparse_fmha/cpu/pairs.h"
#endif
