// mbarrier objects, kept in the eight bytes of shared memory that a kernel gives them.
#pragma once

#include <cstdint>

namespace emulator {

// A view of one mbarrier object. A phase is complete when no arrivals and no transferred bytes are
// pending; the next phase then expects the initial count of arrivals again. Faults throw Fault.
class Mbarrier {
 public:
  static constexpr uint32_t kLargestCount = (1u << 20) - 1;

  // `word` are the eight bytes, which must outlive the view.
  explicit Mbarrier(uint64_t& word) : word_(word) {}

  void init(uint32_t count);
  void invalidate();

  // mbarrier.arrive: returns the state before the arrival, for test_wait. With drop, the later
  // phases expect as many arrivals less (mbarrier.arrive_drop).
  uint64_t arrive(uint32_t count = 1);
  uint64_t arrive_drop(uint32_t count = 1);
  // mbarrier.expect_tx and mbarrier.arrive.expect_tx: bytes that will be transferred in this phase.
  void expect_tx(uint32_t bytes);
  uint64_t arrive_expect_tx(uint32_t bytes, uint32_t count = 1);
  // Bytes have been transferred, as by cp.async.bulk.
  void complete_tx(uint32_t bytes);

  // mbarrier.test_wait and try_wait: whether the phase of `state` is complete.
  bool test_wait(uint64_t state) const;
  // The same for the phase with a parity, the current or the preceding one.
  bool test_wait_parity(uint32_t parity) const;

  uint32_t pending_count() const;
  uint32_t expected_count() const;
  int32_t pending_bytes() const;
  uint32_t parity() const;  // of the phase under way
  bool initialized() const;

 private:
  struct Fields;
  Fields read() const;
  void write(Fields fields);

  uint64_t& word_;
};

}  // namespace emulator
