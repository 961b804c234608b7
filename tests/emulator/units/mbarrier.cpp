#include "mbarrier.h"

#include <string>

#include "shared_memory.h"

namespace emulator {

// What the word holds. Bytes may be transferred before they are expected, so their number is
// signed.
struct Mbarrier::Fields {
  uint32_t expected;  // arrivals of each phase; 20 bits
  uint32_t pending;   // arrivals of this phase; 20 bits
  int32_t bytes;      // 22 bits, signed
  uint32_t parity;    // 1 bit
};

namespace {

constexpr int32_t kLargestBytes = (1 << 20) - 1;

[[noreturn]] void fault(char const* what) { throw Fault(std::string("mbarrier: ") + what); }

}  // namespace

Mbarrier::Fields Mbarrier::read() const {
  Fields fields;
  fields.expected = word_ & kLargestCount;
  fields.pending = word_ >> 20 & kLargestCount;
  fields.bytes = static_cast<int32_t>(static_cast<uint32_t>(word_ >> 40) << 10) >> 10;
  fields.parity = word_ >> 63;
  if (fields.expected == 0) {
    fault("used without initialisation");
  }
  return fields;
}

void Mbarrier::write(Fields fields) {
  if (fields.pending == 0 && fields.bytes == 0) {  // the phase is complete
    fields.pending = fields.expected;
    fields.parity ^= 1;
  }
  if (fields.bytes > kLargestBytes || fields.bytes < -kLargestBytes) {
    fault("more than 2^20 - 1 pending bytes");
  }
  word_ = uint64_t{fields.expected} | uint64_t{fields.pending} << 20 |
          (uint64_t{static_cast<uint32_t>(fields.bytes)} & 0x3fffff) << 40 |
          uint64_t{fields.parity} << 63;
}

void Mbarrier::init(uint32_t count) {
  if (count == 0 || count > kLargestCount) {
    fault("initialised with a count outside of 1 to 2^20 - 1");
  }
  word_ = uint64_t{count} | uint64_t{count} << 20;
}

void Mbarrier::invalidate() { word_ = 0; }

uint64_t Mbarrier::arrive(uint32_t count) {
  uint64_t const state = word_;
  Fields fields = read();
  if (count == 0 || count > fields.pending) {
    fault("more arrivals than the phase expects");
  }
  fields.pending -= count;
  write(fields);
  return state;
}

uint64_t Mbarrier::arrive_drop(uint32_t count) {
  uint64_t const state = word_;
  Fields fields = read();
  if (count == 0 || count > fields.pending || count >= fields.expected) {
    fault("more arrivals dropped than the phase expects");
  }
  fields.expected -= count;
  fields.pending -= count;
  write(fields);
  return state;
}

void Mbarrier::expect_tx(uint32_t bytes) {
  Fields fields = read();
  fields.bytes += static_cast<int32_t>(bytes);
  write(fields);
}

uint64_t Mbarrier::arrive_expect_tx(uint32_t bytes, uint32_t count) {
  uint64_t const state = word_;
  expect_tx(bytes);
  arrive(count);
  return state;
}

void Mbarrier::complete_tx(uint32_t bytes) {
  Fields fields = read();
  fields.bytes -= static_cast<int32_t>(bytes);
  write(fields);
}

bool Mbarrier::test_wait(uint64_t state) const { return read().parity != state >> 63; }

bool Mbarrier::test_wait_parity(uint32_t parity) const { return read().parity != (parity & 1); }

uint32_t Mbarrier::pending_count() const { return read().pending; }
uint32_t Mbarrier::expected_count() const { return read().expected; }
int32_t Mbarrier::pending_bytes() const { return read().bytes; }
uint32_t Mbarrier::parity() const { return read().parity; }
bool Mbarrier::initialized() const { return (word_ & kLargestCount) != 0; }

}  // namespace emulator
