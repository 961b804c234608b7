#include "../units/mbarrier.h"

#include "../units/shared_memory.h"
#include "check.h"

namespace unit_tests {
namespace {

using emulator::Fault;
using emulator::Mbarrier;

void arrivals_complete_phases() {
  uint64_t word = 0;
  Mbarrier barrier(word);
  barrier.init(3);
  // As after initialisation in PTX: the preceding phase, of parity 1, is complete.
  CHECK(barrier.test_wait_parity(1));
  CHECK(!barrier.test_wait_parity(0));
  for (uint32_t phase = 0; phase < 5; ++phase) {
    uint64_t const state = barrier.arrive();
    barrier.arrive();
    CHECK(!barrier.test_wait(state));
    CHECK(barrier.pending_count() == 1);
    barrier.arrive();
    CHECK(barrier.test_wait(state));
    CHECK(barrier.test_wait_parity(phase % 2));
    CHECK(!barrier.test_wait_parity((phase + 1) % 2));
    CHECK(barrier.pending_count() == 3);
  }
}

void bytes_hold_phases() {
  uint64_t word = 0;
  Mbarrier barrier(word);
  barrier.init(1);
  barrier.arrive_expect_tx(4096);
  CHECK(!barrier.test_wait_parity(0));
  barrier.complete_tx(4000);
  CHECK(barrier.pending_bytes() == 96);
  barrier.complete_tx(96);
  CHECK(barrier.test_wait_parity(0));
  // Bytes may arrive before they are expected.
  barrier.complete_tx(64);
  CHECK(barrier.pending_bytes() == -64);
  CHECK(!barrier.test_wait_parity(1));
  barrier.arrive_expect_tx(64);
  CHECK(barrier.test_wait_parity(1));
  barrier.arrive_expect_tx(0);
  CHECK(barrier.test_wait_parity(0));
}

void counts_are_kept() {
  uint64_t word = 0;
  Mbarrier barrier(word);
  barrier.init(Mbarrier::kLargestCount);
  CHECK(barrier.expected_count() == Mbarrier::kLargestCount);
  barrier.arrive(Mbarrier::kLargestCount);
  CHECK(barrier.parity() == 1);
  barrier.init(4);
  barrier.arrive_drop();
  barrier.arrive(3);
  CHECK(barrier.expected_count() == 3);
  CHECK(barrier.pending_count() == 3);
}

void misuse_is_a_fault() {
  uint64_t word = 0;
  Mbarrier barrier(word);
  CHECK(throws<Fault>([&] { barrier.arrive(); }));
  CHECK(throws<Fault>([&] { barrier.init(0); }));
  barrier.init(2);
  CHECK(throws<Fault>([&] { barrier.arrive(3); }));
  CHECK(throws<Fault>([&] { barrier.expect_tx(1 << 20); }));
  barrier.invalidate();
  CHECK(!barrier.initialized());
  CHECK(throws<Fault>([&] { barrier.test_wait_parity(0); }));
}

}  // namespace

void test_mbarriers() {
  arrivals_complete_phases();
  bytes_hold_phases();
  counts_are_kept();
  misuse_is_a_fault();
}

}  // namespace unit_tests
