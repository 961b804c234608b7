// cp.async.bulk and cp.reduce.async.bulk: the copy engine. Loads land after some rounds of the
// scheduler; stores read shared memory when a wait asks for it.
#include "../units/bulk_copy.h"

#include "../units/mbarrier.h"
#include "../units/tensor_map.h"
#include "addresses.h"

namespace emulator {

bool decode_thread_copy(Decoder& decoder, ptx::Statement const& statement, Instruction& i);

namespace {

struct Late : Details {
  int64_t global_offset = 0;
  int64_t barrier_offset = 0;
};

Late const& late_of(Instruction const& i) { return static_cast<Late const&>(*i.details); }

uint32_t shared_address(Warp& warp, int32_t base, int lane, int64_t offset) {
  return static_cast<uint32_t>(warp.reg(base)[lane] + static_cast<uint64_t>(offset));
}

// Lands `copy`, then adds the bytes to the barrier.
template <class F>
void land_later(Warp& warp, int32_t line, uint32_t barrier, uint32_t to, uint32_t bytes, F copy) {
  Block* const block = warp.block;
  auto* const word = reinterpret_cast<uint64_t*>(shared_at(*block, barrier, 8));
  block->late.push_back({block->grid->landing(), word, line, [=] {
                           copy(block->shared);
                           block->order.replaced(to, bytes);
                           Mbarrier(*word).complete_tx(bytes);
                         }});
}

Coordinates coordinates(Warp& warp, Instruction const& i, size_t first, int lane) {
  Coordinates at{};
  for (uint32_t k = 0; k < i.count; ++k) {
    at[k] = static_cast<int32_t>(warp.reg(i.at[first + k])[lane]);
  }
  return at;
}

TensorMap const& map_at(Warp& warp, Instruction const& i, int32_t base, int lane) {
  TensorMap const& map =
      read_tensor_map(host_at(warp.reg(base)[lane] + late_of(i).global_offset, 64));
  if (map.rank != i.count) {
    fault("the tensor map has rank " + std::to_string(map.rank) + ", the instruction " +
          std::to_string(i.count));
  }
  return map;
}

// Registers: the shared address, the map, the barrier, the coordinates.
Outcome load_tensor(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    TensorMap const& map = map_at(warp, i, i.at[1], lane);
    Coordinates const at = coordinates(warp, i, 3, lane);
    uint32_t const to = shared_address(warp, i.at[0], lane, i.offset);
    shared_at(*warp.block, to, 128);
    uint32_t const barrier = shared_address(warp, i.at[2], lane, late_of(i).barrier_offset);
    land_later(warp, i.line, barrier, to, tile_bytes(map),
               [&map, at, to](SharedMemory shared) { load_tile(map, at, shared, to); });
  });
  return Outcome::kNext;
}

// Registers: the shared address, the global one, the barrier, the bytes.
Outcome load_bytes(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    auto const bytes = static_cast<uint32_t>(warp.reg(i.at[3])[lane]);
    std::byte const* const from = host_at(warp.reg(i.at[1])[lane] + late_of(i).global_offset, 16);
    uint32_t const to = shared_address(warp, i.at[0], lane, i.offset);
    shared_at(*warp.block, to, 16);
    uint32_t const barrier = shared_address(warp, i.at[2], lane, late_of(i).barrier_offset);
    land_later(warp, i.line, barrier, to, bytes,
               [from, bytes, to](SharedMemory shared) { bulk_load(shared, to, from, bytes); });
  });
  return Outcome::kNext;
}

uint32_t thread_of(Warp const& warp, int lane) {
  return warp.index * kLanes + static_cast<uint32_t>(lane);
}

// Registers: the shared address, the map, the coordinates.
Outcome store_tensor(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    TensorMap const& map = map_at(warp, i, i.at[1], lane);
    Coordinates const at = coordinates(warp, i, 2, lane);
    uint32_t const from = shared_address(warp, i.at[0], lane, i.offset);
    shared_at(*warp.block, from, 128);
    warp.block->order.check(from, tile_bytes(map), thread_of(warp, lane));
    SharedMemory const shared = warp.block->shared;
    warp.bulk[lane].open.work.push_back(
        [&map, at, shared, from] { store_tile(map, at, shared, from); });
  });
  return Outcome::kNext;
}

// Registers: the shared address, the global one, the bytes.
template <auto kCopy>
Outcome store_bytes(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    auto const bytes = static_cast<uint32_t>(warp.reg(i.at[2])[lane]);
    std::byte* const to = host_at(warp.reg(i.at[1])[lane] + late_of(i).global_offset, 16);
    uint32_t const from = shared_address(warp, i.at[0], lane, i.offset);
    shared_at(*warp.block, from, 16);
    warp.block->shared.at(from, bytes);
    warp.block->order.check(from, bytes, thread_of(warp, lane));
    SharedMemory const shared = warp.block->shared;
    warp.bulk[lane].open.work.push_back([=] { kCopy(to, shared, from, bytes); });
  });
  return Outcome::kNext;
}

Outcome commit(Warp& warp, Instruction const&, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    Warp::BulkStores& stores = warp.bulk[lane];
    stores.committed.push_back(std::move(stores.open));
    stores.open = {};
  });
  return Outcome::kNext;
}

// value: the groups that may be pending afterwards. .read asks only that shared memory has been
// read; the bytes are then written, too.
Outcome wait_group(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    auto& groups = warp.bulk[lane].committed;
    size_t const done = groups.size() > i.value ? groups.size() - i.value : 0;
    for (size_t g = 0; g < done; ++g) {
      for (auto const& work : groups[g].work) {
        work();
      }
    }
    groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(done));
  });
  ++warp.block->grid->progress;
  return Outcome::kNext;
}

// The places of the operands: the one in shared memory, the one in global memory.
void addresses(Decoder& decoder, Instruction& i, Late& late, ptx::Operand const& shared,
               ptx::Operand const& global) {
  Instruction other;
  decoder.address(global, other);
  late.global_offset = other.offset;
  decoder.address(shared, i);
  i.at.push_back(other.at[0]);
}

bool decode_copy(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  auto const& opcode = statement.opcode;
  auto const& operands = statement.operands;
  bool const reduces = opcode.at(1) == "reduce";
  bool const bulk = reduces || (opcode.size() > 2 && opcode[2] == "bulk");
  if (!bulk) {
    return decode_thread_copy(decoder, statement, i);
  }
  if (has_part(statement, "commit_group")) {
    i.run = commit;
    return true;
  }
  if (has_part(statement, "wait_group")) {
    i.run = wait_group;
    i.value = decoder.immediate(statement, 0);
    return true;
  }
  if (has_part(statement, "multicast::cluster") || has_part(statement, "im2col") ||
      has_part(statement, "prefetch")) {
    return false;
  }
  auto late = std::make_shared<Late>();
  i.details = late;
  bool const tensor = has_part(statement, "tensor");
  bool const stores = has_part(statement, "bulk_group");
  if (tensor) {
    if (reduces) {
      return false;
    }
    ptx::Operand const& map = operands.at(stores ? 0 : 1);
    addresses(decoder, i, *late, operands.at(stores ? 1 : 0), map);
    if (!stores) {
      Instruction barrier;
      decoder.address(operands.at(2), barrier);
      late->barrier_offset = barrier.offset;
      i.at.push_back(barrier.at[0]);
    }
    i.count = static_cast<uint32_t>(map.elements.at(0).elements.size());
    decoder.append(map.elements[0], i.at);
    i.run = stores ? store_tensor : load_tensor;
    return has_part(statement, (std::to_string(i.count) + "d").c_str());
  }
  if (stores) {
    addresses(decoder, i, *late, operands.at(1), operands.at(0));
    i.at.push_back(decoder.reg(operands.at(2)));
    i.run = !reduces ? store_bytes<bulk_store> : store_bytes<bulk_add_f32>;
    return opcode.back() == "bulk_group" || has_part(statement, "L2::cache_hint") ||
           (reduces && has_part(statement, "add") && opcode.back() == "f32");
  }
  addresses(decoder, i, *late, operands.at(0), operands.at(1));
  Instruction barrier;
  decoder.address(operands.at(3), barrier);
  late->barrier_offset = barrier.offset;
  i.at.push_back(barrier.at[0]);
  i.at.push_back(decoder.reg(operands.at(2)));
  i.run = load_bytes;
  return has_part(statement, "mbarrier::complete_tx::bytes");
}

Outcome no_policy(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) { warp.reg(i.at[0])[lane] = 0; });
  return Outcome::kNext;
}
bool decode_policy(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  i.run = no_policy;
  i.at = {decoder.reg(statement.operands.at(0))};
  return true;
}

}  // namespace

void add_bulk_copies(DecodeTable& table) {
  table["cp"] = decode_copy;
  table["createpolicy"] = decode_policy;
}

}  // namespace emulator
