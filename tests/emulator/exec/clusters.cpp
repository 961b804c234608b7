// barrier.cluster, mapa, and stores and loads in shared::cluster. An address there has the rank of
// its block, counted from one, above the address in the block; without one it is the own block's.
#include "clusters.h"

#include <cstring>

#include "addresses.h"

namespace emulator {
namespace {

constexpr uint32_t kRankBit = 24;

// How often each lane has arrived is in the warp.
Outcome arrive(Warp& warp, Instruction const& i, uint32_t lanes) {
  if (i.count != 0 && !all_here(warp, lanes)) {
    return Outcome::kBlocked;
  }
  Cluster& cluster = *warp.block->cluster;
  each_lane(lanes, [&](int lane) {
    if (warp.cluster_arrivals[lane] != warp.cluster_waits[lane]) {
      fault("arrives at the cluster's barrier twice without a wait between");
    }
    ++warp.cluster_arrivals[lane];
  });
  ++warp.block->grid->progress;
  complete_if_arrived(cluster);
  return Outcome::kNext;
}

Outcome wait(Warp& warp, Instruction const& i, uint32_t lanes) {
  if (i.count != 0 && !all_here(warp, lanes)) {
    return Outcome::kBlocked;
  }
  Cluster& cluster = *warp.block->cluster;
  complete_if_arrived(cluster);  // threads may have ended since
  bool done = true;
  each_lane(lanes, [&](int lane) {
    if (warp.cluster_arrivals[lane] == warp.cluster_waits[lane]) {
      fault("waits at the cluster's barrier without an arrival before");
    }
    done &= cluster.completed >= warp.cluster_arrivals[lane];
  });
  if (!done) {
    return Outcome::kBlocked;
  }
  each_lane(lanes, [&](int lane) { warp.cluster_waits[lane] = warp.cluster_arrivals[lane]; });
  ++warp.block->grid->progress;
  return Outcome::kNext;
}

bool decode_barrier(ptx::Statement const& statement, Instruction& i) {
  i.run = has_part(statement, "arrive") ? arrive : wait;
  i.count = has_part(statement, "aligned");
  return has_part(statement, "arrive") != has_part(statement, "wait");
}

// Registers: the result, the address, the rank.
Outcome map_address(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    uint64_t const rank = static_cast<uint32_t>(warp.reg(i.at[2])[lane]);
    if (rank >= warp.block->cluster->blocks.size()) {
      fault("the cluster has no block " + std::to_string(rank));
    }
    warp.reg(i.at[0])[lane] = static_cast<uint32_t>(warp.reg(i.at[1])[lane]) | (rank + 1)
                                                                                   << kRankBit;
  });
  return Outcome::kNext;
}

struct Remote {
  Block* block;
  std::byte* data;
};
Remote remote_at(Warp& warp, Instruction const& i, int lane, uint32_t bytes) {
  auto const address =
      static_cast<uint32_t>(warp.reg(i.at[0])[lane] + static_cast<uint64_t>(i.offset));
  uint32_t const rank = address >> kRankBit;
  Block* const block = rank == 0 ? warp.block : warp.block->cluster->blocks.at(rank - 1);
  if (block == nullptr) {
    fault("the block whose shared memory this is has ended");
  }
  return {block, shared_at(*block, address & ((1u << kRankBit) - 1), bytes)};
}

// Registers: the address, then the elements of `bytes` each.
Outcome store(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    Remote const to = remote_at(warp, i, lane, i.count * i.bytes);
    std::vector<std::byte> values(size_t{i.count} * i.bytes);
    for (uint32_t k = 0; k < i.count; ++k) {
      std::memcpy(values.data() + size_t{k} * i.bytes, &warp.reg(i.at[k + 1])[lane], i.bytes);
    }
    auto const land = [to, values] { std::memcpy(to.data, values.data(), values.size()); };
    if (to.block == warp.block) {
      land();
    } else {
      warp.block->cluster->late.push_back(land);
    }
  });
  ++warp.block->grid->progress;
  return Outcome::kNext;
}
Outcome load(Warp& warp, Instruction const& i, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    std::byte const* const from = remote_at(warp, i, lane, i.count * i.bytes).data;
    for (uint32_t k = 0; k < i.count; ++k) {
      uint64_t value = 0;
      std::memcpy(&value, from + size_t{k} * i.bytes, i.bytes);
      warp.reg(i.at[k + 1])[lane] = value;
    }
  });
  return Outcome::kNext;
}

bool decode_access(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  bool const stores = statement.opcode[0] == "st";
  std::string const bits = statement.opcode.back().substr(1);
  i.run = stores ? store : load;
  i.count = vector_size(statement);
  i.bytes = bits == "32" ? 4 : bits == "64" ? 8 : 0;
  decoder.address(statement.operands.at(stores ? 0 : 1), i);
  decoder.append(statement.operands.at(stores ? 1 : 0), i.at);
  return i.bytes != 0 && i.at.size() == i.count + 1 && statement.opcode.at(1) != "async";
}

}  // namespace

void complete_if_arrived(Cluster& cluster) {
  for (Block const* const block : cluster.blocks) {
    if (block == nullptr) {
      continue;
    }
    for (Warp const& warp : block->warps) {
      bool all = true;
      each_lane(warp.live,
                [&](int lane) { all &= warp.cluster_arrivals[lane] > cluster.completed; });
      if (!all) {
        return;
      }
    }
  }
  ++cluster.completed;
  for (auto const& land : cluster.late) {
    land();
  }
  cluster.late.clear();
}

bool is_of_clusters(ptx::Statement const& statement) {
  std::string const& what = statement.opcode[0];
  return what == "mapa" || (what == "barrier" && has_part(statement, "cluster")) ||
         ((what == "st" || what == "ld") && has_part(statement, "shared::cluster"));
}

bool decode_of_clusters(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  std::string const& what = statement.opcode[0];
  if (what == "barrier") {
    return decode_barrier(statement, i);
  }
  if (what != "mapa") {
    return decode_access(decoder, statement, i);
  }
  i.run = map_address;
  for (ptx::Operand const& operand : statement.operands) {
    i.at.push_back(decoder.reg(operand));
  }
  return i.at.size() == 3 && has_part(statement, "shared::cluster");
}

}  // namespace emulator
