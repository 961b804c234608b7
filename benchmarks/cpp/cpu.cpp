#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "machine.h"

namespace sparse_fmha::bench {
namespace {

constexpr int64_t kFlushBytes = int64_t{64} << 20;

// One contiguous share for each hardware thread.
struct Threads : ParallelFor {
  int num_threads() const override {
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }

  void run(int64_t n, void (*body)(void*, int64_t, int64_t), void* arg) const override {
    int64_t const shares = std::min<int64_t>(n, num_threads());
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < shares; ++i) {
      threads.emplace_back(body, arg, n * i / shares, n * (i + 1) / shares);
    }
    if (n > 0) {
      body(arg, 0, n / shares);
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  }
};

class Cpu : public Machine {
 public:
  void* allocate(int64_t bytes, std::vector<char> const& pattern) override {
    auto const period = static_cast<int64_t>(pattern.size());
    auto& block = blocks_.emplace_back(new char[bytes]);
    for (int64_t at = 0; at < bytes; at += period) {
      std::memcpy(block.get() + at, pattern.data(), std::min(period, bytes - at));
    }
    return block.get();
  }

  void flush() override { std::fill(scratch_.begin(), scratch_.end(), ++flushes_); }

  void run(Launch const& launch) override {
    Threads const threads;
    ExecutionContext context;
    context.parallel = &threads;
    launch(context);
  }

  double time(char const* /*name*/, Launch const& launch) override {
    auto const start = std::chrono::steady_clock::now();
    run(launch);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
  std::vector<char> scratch_ = std::vector<char>(kFlushBytes);
  char flushes_ = 0;
};

}  // namespace

std::unique_ptr<Machine> make_cpu() { return std::make_unique<Cpu>(); }

}  // namespace sparse_fmha::bench
