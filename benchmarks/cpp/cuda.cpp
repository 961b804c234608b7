#include <cuda_runtime_api.h>

#include <algorithm>
#include <nvtx3/nvtx3.hpp>

#include "machine.h"
#include "sparse_fmha/cuda/check.h"

namespace sparse_fmha::bench {
namespace {

constexpr size_t kFlushBytes = size_t{256} << 20;

class Memory {
 public:
  explicit Memory(size_t bytes) { check_cuda(cudaMalloc(&data_, bytes), "cudaMalloc"); }
  ~Memory() { cudaFree(data_); }
  Memory(Memory const&) = delete;
  Memory& operator=(Memory const&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_ = nullptr;
};

// Launches of one stream use it one after another.
class Workspace : public DeviceMemory {
 public:
  void reset() { used_ = 0; }
  void* allocate(size_t bytes) override {
    if (used_ == blocks_.size() || blocks_[used_].bytes < bytes) {
      blocks_.insert(blocks_.begin() + used_,
                     {bytes, std::make_unique<Memory>(static_cast<int64_t>(bytes))});
    }
    return blocks_[used_++].memory->data();
  }

 private:
  struct Block {
    size_t bytes;
    std::unique_ptr<Memory> memory;
  };
  std::vector<Block> blocks_;
  size_t used_ = 0;
};

class Event {
 public:
  Event() { check_cuda(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(Event const&) = delete;
  Event& operator=(Event const&) = delete;
  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class Cuda : public Machine {
 public:
  void* allocate(int64_t bytes, std::vector<char> const& pattern) override {
    auto const period = static_cast<int64_t>(pattern.size());
    char* block = blocks_.emplace_back(std::make_unique<Memory>(bytes))->data();
    for (int64_t at = 0; at < bytes; at += period) {
      check_cuda(cudaMemcpy(block + at, pattern.data(), std::min(period, bytes - at),
                            cudaMemcpyHostToDevice),
                 "filling a tensor");
    }
    return block;
  }

  void flush() override {
    check_cuda(cudaMemsetAsync(scratch_.data(), 0, kFlushBytes), "flushing the L2 cache");
  }

  void run(Launch const& launch) override {
    ExecutionContext context;
    context.memory = &workspace_;
    workspace_.reset();
    launch(context);
  }

  // What is queued before, a flush or an untimed launch, keeps the GPU busy while the host queues
  // this: the time holds no gap in which the GPU waits.
  double time(char const* name, Launch const& launch) override {
    nvtx3::scoped_range const range{name};
    check_cuda(cudaEventRecord(start_), "cudaEventRecord");
    run(launch);
    check_cuda(cudaEventRecord(end_), "cudaEventRecord");
    check_cuda(cudaEventSynchronize(end_), "running a kernel");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, start_, end_), "cudaEventElapsedTime");
    return milliseconds * 1e-3;
  }

 private:
  Memory scratch_{kFlushBytes};
  Workspace workspace_;
  Event start_;
  Event end_;
  std::vector<std::unique_ptr<Memory>> blocks_;
};

}  // namespace

std::unique_ptr<Machine> make_cuda() { return std::make_unique<Cuda>(); }

}  // namespace sparse_fmha::bench
