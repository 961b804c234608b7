// Decode attention on the CPU: its work, cut by request, KV head, group of rows and split of the
// keys, and its entries in the registry.
#include "sparse_fmha/core/decode.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "sparse_fmha/cpu/decode_isa.h"
#include "sparse_fmha/cpu/dispatch.h"
#include "sparse_fmha/cpu/kernel_rows.h"

namespace sparse_fmha {
namespace {

constexpr int kMaxHeadDim = 256;

// The splits [begin, end) with slots that the group of rows may see.
KeyRange splits_of(DecodeKeys const& keys, cpu::DecodeRows const& at) {
  KeyRange const rows = keys.rows_of(at.row_group);
  int32_t const first_query = rows.begin / keys.group;
  KeyRange const range = keys.range(at.batch, at.head);
  int32_t end = keys.slots(range, at.batch, first_query, at.head);
  int32_t begin = 0;
  if (keys.form == DecodeKeys::Form::kRange) {  // slots are in order of the positions
    begin = keys.visible(range, first_query).begin - range.begin;
    end = keys.visible(range, (rows.end - 1) / keys.group).end - range.begin;
  }
  return begin < end ? KeyRange{begin / keys.split, (end - 1) / keys.split + 1} : KeyRange{0, 0};
}

void launch(FmhaProblem const& problem, ExecutionContext const& context) {
  DecodeKeys const& keys = *problem.decode;
  cpu::DecodeIsa const isa =
      SPARSE_FMHA_BEST_ISA(decode(problem.dtype, problem.skip_threshold != nullptr));
  int32_t const row_groups = keys.row_groups();
  int64_t const groups = int64_t{problem.batch} * problem.heads_kv * row_groups;
  auto const rows_of = [&](int64_t group) {
    int64_t const head = group / row_groups;
    return cpu::DecodeRows{static_cast<int32_t>(head / problem.heads_kv),
                           static_cast<int32_t>(head % problem.heads_kv),
                           static_cast<int32_t>(group % row_groups)};
  };
  std::vector<int64_t> first(groups + 1, 0);  // item of each group; a group without keys has one
  std::vector<int32_t> first_split(groups);
  for (int64_t group = 0; group < groups; ++group) {
    KeyRange const splits = splits_of(keys, rows_of(group));
    first_split[group] = splits.begin;
    first[group + 1] = first[group] + std::max(1, splits.end - splits.begin);
  }
  size_t const bytes = isa.partial_bytes(problem);
  std::unique_ptr<char, cpu::AlignedDelete> const partials(
      static_cast<char*>(::operator new(first[groups] * bytes, std::align_val_t{64})));
  cpu::share(context, first[groups], isa.scratch_bytes(problem), [&](int64_t item, void* scratch) {
    int64_t const group = std::upper_bound(first.begin(), first.end(), item) - first.begin() - 1;
    cpu::DecodeRows const rows = rows_of(group);
    int32_t const query = keys.rows_of(rows.row_group).begin / keys.group;
    int32_t const slots =
        keys.slots(keys.range(rows.batch, rows.head), rows.batch, query, rows.head);
    int64_t const begin = (first_split[group] + item - first[group]) * keys.split;
    int64_t const end = std::min<int64_t>(begin + keys.split, slots);
    void* const partial = partials.get() + item * bytes;
    isa.attend(problem, rows, {static_cast<int32_t>(begin), static_cast<int32_t>(end)}, partial,
               scratch);
    if (first[group + 1] - first[group] == 1) {
      isa.merge(problem, rows, 1, partial);
    }
  });
  if (first[groups] == groups) {
    return;
  }
  cpu::share(context, groups, 0, [&](int64_t group, void*) {
    int64_t const parts = first[group + 1] - first[group];
    if (parts > 1) {
      isa.merge(problem, rows_of(group), parts, partials.get() + first[group] * bytes);
    }
  });
}

}  // namespace

std::vector<KernelRow> cpu_decode_rows() {
  std::vector<KernelRow> rows;
  for (DataType dtype :
       {DataType::kFloat16, DataType::kBFloat16, DataType::kFloat32, DataType::kFloat64}) {
    for (bool skips : {false, true}) {
      KernelRow row;
      row.info.key = {Arch::kCpu,  Pass::kDecode, dtype,
                      kMaxHeadDim, kMaxHeadDim,   mechanism_index<Dense>(),
                      skips};
      row.info.mechanism = Dense::kName;
      row.info.name = std::string("cpu_decode_") + to_string(dtype) + (skips ? "_skip" : "");
      row.info.tile_q = DecodeKeys::kRows;
      row.info.tile_k = DecodeKeys::kTile;
      row.launch = launch;
      rows.push_back(row);
    }
  }
  return rows;
}

}  // namespace sparse_fmha
