#include "launch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "bad_access.h"
#include "scheduler.h"

namespace emulator {
namespace {

constexpr uint32_t kMostShared = 227 * 1024;  // of a block, static and dynamic
constexpr uint64_t kPatience = 20000;         // rounds without any progress

uint64_t setting(char const* name) {
  char const* const text = std::getenv(name);
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
}

using Values = std::unordered_map<std::string, uint64_t>;

void add_dimensions(Values& to, std::string const& name, Dim3 const& value) {
  to[name + ".x"] = value.x;
  to[name + ".y"] = value.y;
  to[name + ".z"] = value.z;
}

// Special registers that are the same in all threads of a block. %clock and its like are read by
// instructions of their own.
Values block_values(Grid const& grid, Block const& block) {
  Dim3 const& cluster = grid.launch.cluster;
  Values result;
  add_dimensions(result, "%ntid", grid.launch.block);
  add_dimensions(result, "%ctaid", block.index);
  add_dimensions(result, "%nctaid", grid.launch.grid);
  add_dimensions(result, "%cluster_nctaid", cluster);
  add_dimensions(result, "%cluster_ctaid",
                 {block.index.x % cluster.x, block.index.y % cluster.y, block.index.z % cluster.z});
  add_dimensions(result, "%clusterid",
                 {block.index.x / cluster.x, block.index.y / cluster.y, block.index.z / cluster.z});
  result["%cluster_ctarank"] = block.rank;
  result["%cluster_nctarank"] = cluster.count();
  result["%nwarpid"] = block.warps.size();
  result["%smid"] = block.index.x;
  result["%dynamic_smem_size"] = grid.launch.dynamic_shared;
  for (char const* clock : {"%clock", "%clock64", "%clock_hi", "%globaltimer"}) {
    result[clock] = 0;
  }
  return result;
}

void set_special(Warp& warp, std::string const& name, int32_t reg, Values const& values) {
  Dim3 const& size = warp.block->grid->launch.block;
  auto const fill = [&](auto value) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      warp.reg(reg)[lane] = value(lane);
    }
  };
  uint32_t const first = warp.index * kLanes;
  if (name == "%tid.x") {
    fill([&](uint32_t lane) { return (first + lane) % size.x; });
  } else if (name == "%tid.y") {
    fill([&](uint32_t lane) { return (first + lane) / size.x % size.y; });
  } else if (name == "%tid.z") {
    fill([&](uint32_t lane) { return (first + lane) / size.x / size.y; });
  } else if (name == "%laneid") {
    fill([&](uint32_t lane) { return lane; });
  } else if (name == "%warpid") {
    fill([&](uint32_t) { return warp.index; });
  } else if (name == "%lanemask_eq") {
    fill([&](uint32_t lane) { return 1u << lane; });
  } else if (name == "%lanemask_lt") {
    fill([&](uint32_t lane) { return (1u << lane) - 1; });
  } else if (name == "%lanemask_le") {
    fill([&](uint32_t lane) { return static_cast<uint32_t>((2ull << lane) - 1); });
  } else if (name == "%lanemask_gt") {
    fill([&](uint32_t lane) { return static_cast<uint32_t>(~((2ull << lane) - 1)); });
  } else if (name == "%lanemask_ge") {
    fill([&](uint32_t lane) { return ~((1u << lane) - 1); });
  } else {
    auto const found = values.find(name);
    if (found == values.end()) {
      throw Error("kernel " + warp.block->grid->code->name + ": the register " + name +
                  " is not emulated");
    }
    fill([&](uint32_t) { return found->second; });
  }
}

void start(Block& block, Grid& grid, Dim3 index, std::vector<uint64_t>& registers,
           Buffer const& shared) {
  Code const& code = *grid.code;
  block.grid = &grid;
  block.index = index;
  block.shared = {shared.data(), static_cast<uint32_t>(shared.size())};
  std::memset(shared.data(), 0xff, shared.size());  // NaN as float, an invalid mbarrier
  auto const threads = static_cast<uint32_t>(grid.launch.block.count());
  block.live_threads = threads;
  block.order.start(static_cast<uint32_t>(shared.size()), (threads + kLanes - 1) / kLanes * kLanes);
  block.warps.resize((threads + kLanes - 1) / kLanes);
  Values const values = block_values(grid, block);
  for (uint32_t w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    warp.block = &block;
    warp.index = w;
    warp.registers = registers.data() + static_cast<size_t>(w) * code.registers * kLanes;
    uint32_t const count = std::min<uint32_t>(kLanes, threads - w * kLanes);
    warp.live = count == kLanes ? kAllLanes : (1u << count) - 1;
    warp.accessed.assign(static_cast<size_t>(code.registers), code.has_products);
    warp.unfinished.assign(static_cast<size_t>(code.registers), 0);
    warp.local.resize(size_t{code.attributes.local} * kLanes + 64);
    auto const local = (reinterpret_cast<uint64_t>(warp.local.data()) + 63) / 64 * 64;
    for (auto const& [reg, value] : code.constants) {
      std::fill_n(warp.reg(reg), kLanes, value);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (auto const& [reg, offset] : code.locals) {
        warp.reg(reg)[lane] = local + lane * uint64_t{code.attributes.local} + offset;
      }
    }
    for (auto const& [name, reg] : code.specials) {
      set_special(warp, name, reg, values);
    }
  }
}

void land_due_copies(Block& block) {
  Grid& grid = *block.grid;
  for (size_t k = 0; k < block.late.size();) {
    if (block.late[k].due > grid.round) {
      ++k;
      continue;
    }
    LateCopy const copy = std::move(block.late[k]);
    block.late.erase(block.late.begin() + static_cast<std::ptrdiff_t>(k));
    try {
      copy.work();
    } catch (std::runtime_error const& error) {
      throw Error("kernel " + grid.code->name + ", the copy of PTX line " +
                  std::to_string(copy.line) + ": " + error.what());
    }
    ++grid.progress;
  }
}

void finish(Block const& block) {
  std::string const& name = block.grid->code->name;
  for (Warp const& warp : block.warps) {
    for (Warp::BulkStores const& stores : warp.bulk) {
      if (!stores.committed.empty() || !stores.open.work.empty()) {
        throw Error("kernel " + name + ": warp " + std::to_string(warp.index) +
                    " ends before a bulk store has read shared memory");
      }
    }
  }
  if (!block.late.empty()) {
    throw Error("kernel " + name +
                ": a block ends before a copy into its shared memory has landed");
  }
}

void run_round(Block& block) {
  Grid& grid = *block.grid;
  land_due_copies(block);
  std::vector<Warp*> order;
  for (Warp& warp : block.warps) {
    if (warp.live != 0) {
      order.push_back(&warp);
    }
  }
  if (!grid.late) {
    std::shuffle(order.begin(), order.end(), grid.random);
  }
  for (Warp* const warp : order) {
    run_warp(*warp, grid.late ? 512 : 1u << grid.draw(12));
  }
}

void check(Code const& code, Launch const& launch) {
  uint64_t const threads = launch.block.count();
  if (threads == 0 || threads > code.attributes.max_threads) {
    throw Error("kernel " + code.name + ": a block of " + std::to_string(threads) +
                " threads; at most " + std::to_string(code.attributes.max_threads));
  }
  uint32_t const shared = code.attributes.static_shared + launch.dynamic_shared;
  if (shared > kMostShared) {
    throw Error("kernel " + code.name + ": " + std::to_string(shared) +
                " bytes of shared memory; at most " + std::to_string(kMostShared));
  }
  if (launch.cluster.y != 1 || launch.cluster.z != 1 || launch.grid.x % launch.cluster.x != 0) {
    throw Error("kernel " + code.name + ": clusters must divide a grid along its first dimension");
  }
}

}  // namespace

Module::Module(std::string text) : program_(std::make_unique<Program>(std::move(text))) {}
Module::~Module() = default;
std::vector<std::string> Module::kernels() const { return program_->text().kernels(); }
bool Module::has(std::string const& kernel) const { return program_->text().has(kernel); }
KernelAttributes Module::attributes(std::string const& kernel) {
  return program_->code(kernel).attributes;
}
std::pair<void*, size_t> Module::variable(std::string const& name) {
  return program_->variable(name);
}

void launch(Module& module, std::string const& kernel, Launch const& launch) {
  static std::mutex mutex;
  static std::vector<uint64_t> memory;  // of registers; kept, since it is large
  std::lock_guard<std::mutex> const lock(mutex);
  Code const& code = module.program().code(kernel);
  check(code, launch);
  for (size_t k = 0; k < code.parameter_offsets.size(); ++k) {
    std::memcpy(code.parameters->data() + code.parameter_offsets[k], launch.arguments[k],
                code.attributes.parameters[k]);
  }

  uint64_t const seed = setting("SPARSE_FMHA_EMULATOR_SEED");
  Grid grid;
  grid.launch = launch;
  grid.code = &code;
  grid.random.seed(seed);
  grid.late = seed == 0;

  uint64_t const cluster_size = launch.cluster.x;
  // Whole clusters.
  uint64_t const wanted = std::max(cluster_size, setting("SPARSE_FMHA_EMULATOR_RESIDENT"));
  uint64_t const resident = std::min(wanted / cluster_size * cluster_size, launch.grid.count());
  uint64_t const warps = (launch.block.count() + kLanes - 1) / kLanes;
  struct Place {
    std::vector<uint64_t> registers;
    std::unique_ptr<Buffer> shared;
    std::unique_ptr<Block> block;
  };
  std::vector<Place> places(resident);
  for (Place& place : places) {
    place.registers.swap(memory);
    place.registers.resize(
        std::max<size_t>(place.registers.size(), warps * code.registers * kLanes));
    std::memset(place.registers.data(), 0xff, warps * code.registers * kLanes * sizeof(uint64_t));
    place.shared = std::make_unique<Buffer>(code.dynamic_shared + launch.dynamic_shared);
  }

  BadAccessReport const report;
  uint64_t next = 0;
  uint64_t running = 0;
  uint64_t last_progress = 0, last_round = 0;
  do {
    ++grid.round;
    running = 0;
    for (size_t k = 0; k < places.size(); k += cluster_size) {
      bool const free = std::all_of(places.begin() + k, places.begin() + k + cluster_size,
                                    [](Place const& place) { return place.block == nullptr; });
      if (!free || next >= launch.grid.count()) {
        continue;
      }
      auto const cluster = std::make_shared<Cluster>();
      for (uint32_t rank = 0; rank < cluster_size; ++rank, ++next) {
        Dim3 const& size = launch.grid;
        Dim3 const index{static_cast<uint32_t>(next % size.x),
                         static_cast<uint32_t>(next / size.x % size.y),
                         static_cast<uint32_t>(next / size.x / size.y)};
        Place& place = places[k + rank];
        place.block = std::make_unique<Block>();
        place.block->rank = rank;
        place.block->cluster = cluster;
        cluster->blocks.push_back(place.block.get());
        start(*place.block, grid, index, place.registers, *place.shared);
      }
    }
    for (Place& place : places) {
      if (place.block != nullptr) {
        ++running;
        run_round(*place.block);
        if (place.block->live_threads == 0) {
          finish(*place.block);
          place.block->cluster->blocks[place.block->rank] = nullptr;
          place.block.reset();
        }
      }
    }
    if (grid.progress != last_progress) {
      last_progress = grid.progress;
      last_round = grid.round;
    } else if (grid.round - last_round > kPatience) {
      std::string text = "kernel " + code.name + " does not go on";
      for (Place const& place : places) {
        if (place.block != nullptr) {
          text += "\n" + describe(*place.block);
        }
      }
      throw Error(text);
    }
  } while (running != 0);
  memory.swap(places.front().registers);
}

}  // namespace emulator
