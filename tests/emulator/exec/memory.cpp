// ld and st.
#include "addresses.h"

namespace emulator {
namespace {

// Registers: the address, then the elements.
template <bool kShared, class T>
Outcome load(Warp& warp, Instruction const& i, uint32_t lanes) {
  uint32_t const bytes = i.count * sizeof(T);
  each_lane(lanes, [&](int lane) {
    std::byte const* const from = data_at<kShared>(warp, i, i.at[0], lane, bytes);
    for (uint32_t k = 0; k < i.count; ++k) {
      T value;
      std::memcpy(&value, from + k * sizeof(T), sizeof(T));
      warp.reg(i.at[k + 1])[lane] = static_cast<uint64_t>(value);
    }
  });
  return Outcome::kNext;
}

template <bool kShared, class T>
Outcome store(Warp& warp, Instruction const& i, uint32_t lanes) {
  uint32_t const bytes = i.count * sizeof(T);
  each_lane(lanes, [&](int lane) {
    std::byte* const to = data_at<kShared>(warp, i, i.at[0], lane, bytes);
    for (uint32_t k = 0; k < i.count; ++k) {
      auto const value = static_cast<T>(warp.reg(i.at[k + 1])[lane]);
      std::memcpy(to + k * sizeof(T), &value, sizeof(T));
    }
    note_write<kShared>(warp, i, i.at[0], lane, bytes);
  });
  ++warp.block->grid->progress;
  return Outcome::kNext;
}

template <bool kShared>
Handler loader(std::string const& type) {
  char const kind = type[0];
  std::string const bits = type.substr(1);
  if (bits == "8") {
    return kind == 's' ? load<kShared, int8_t> : load<kShared, uint8_t>;
  }
  if (bits == "16") {
    return kind == 's' ? load<kShared, int16_t> : load<kShared, uint16_t>;
  }
  if (bits == "32") {
    return kind == 's' ? load<kShared, int32_t> : load<kShared, uint32_t>;
  }
  if (bits == "64") {
    return load<kShared, uint64_t>;
  }
  return nullptr;
}
template <bool kShared>
Handler storer(std::string const& type) {
  std::string const bits = type.substr(1);
  if (bits == "8") {
    return store<kShared, uint8_t>;
  }
  if (bits == "16") {
    return store<kShared, uint16_t>;
  }
  if (bits == "32") {
    return store<kShared, uint32_t>;
  }
  if (bits == "64") {
    return store<kShared, uint64_t>;
  }
  return nullptr;
}

bool decode_load(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  std::string const& type = statement.opcode.back();
  i.run = in_shared(statement) ? loader<true>(type) : loader<false>(type);
  i.count = vector_size(statement);
  decoder.address(statement.operands.at(1), i);
  decoder.append(statement.operands.at(0), i.at);
  return i.run != nullptr && i.at.size() == i.count + 1 && !has_part(statement, "shared::cluster");
}

bool decode_store(Decoder& decoder, ptx::Statement const& statement, Instruction& i) {
  std::string const& type = statement.opcode.back();
  i.run = in_shared(statement) ? storer<true>(type) : storer<false>(type);
  i.count = vector_size(statement);
  decoder.address(statement.operands.at(0), i);
  decoder.append(statement.operands.at(1), i.at);
  return i.run != nullptr && i.at.size() == i.count + 1 &&
         !has_part(statement, "shared::cluster") && statement.opcode.at(1) != "async";
}

}  // namespace

void add_memory(DecodeTable& table) {
  table["ld"] = decode_load;
  table["ldu"] = decode_load;
  table["st"] = decode_store;
}

}  // namespace emulator
