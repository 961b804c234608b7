// Rates at which an H200 adds fp32 tiles in shared memory or registers to global memory.
//
//   nvcc -O3 -std=c++17 -arch=sm_90a reduce_ceiling.cu -o reduce_ceiling && ./reduce_ceiling
//
// Forms: one bulk reduce for a 32 KB slab; bulk reduces of 512-byte rows in random order;
// red.global.add.v4.f32 of 16 contiguous bytes a thread, in the order of the slab or by rows.
// Each block adds `steps` tiles of 64 x 128 to places in a buffer of the given size. Blocks start
// at different tiles, so that a line is hot when the buffer fits L2.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

constexpr int kRows = 64, kRowBytes = 512, kTileBytes = kRows * kRowBytes;
enum class Form { kBulkSlab, kBulkRows, kVectorSlab, kVectorRows };

__device__ uint32_t hash(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}
__device__ void bulk_add(float* to, uint32_t from, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
      "r"(from), "r"(bytes)
      : "memory");
}
__device__ void vector_add(float* to, float4 v) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y),
               "f"(v.z), "f"(v.w)
               : "memory");
}
template <Form form>
__global__ void __launch_bounds__(256) add_tiles(float* out, int tiles, int steps, bool together) {
  extern __shared__ __align__(128) float tile[];
  for (int i = threadIdx.x; i < kTileBytes / 4; i += blockDim.x) {
    tile[i] = 1.f;
  }
  asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
  uint32_t const smem = __cvta_generic_to_shared(tile);
  for (int s = 0; s < steps; ++s) {
    int const t = together ? s % tiles : (blockIdx.x * 37 + s) % tiles;
    float* const to = out + int64_t(t) * (kTileBytes / 4);
    if constexpr (form == Form::kBulkSlab) {
      if (threadIdx.x == 0) {
        bulk_add(to, smem, kTileBytes);
      }
    } else if constexpr (form == Form::kBulkRows) {
      if (threadIdx.x < kRows) {
        uint32_t const row = hash(t * kRows + threadIdx.x) % uint32_t(tiles * kRows);
        bulk_add(out + int64_t(row) * 128, smem + threadIdx.x * kRowBytes, kRowBytes);
      }
    } else {
      for (int i = threadIdx.x; i < kTileBytes / 16; i += blockDim.x) {
        if constexpr (form == Form::kVectorSlab) {
          vector_add(to + i * 4, make_float4(1, 1, 1, 1));
        } else {
          uint32_t const row = hash(t * kRows + i / 32) % uint32_t(tiles * kRows);
          vector_add(out + int64_t(row) * 128 + (i % 32) * 4, make_float4(1, 1, 1, 1));
        }
      }
    }
    if constexpr (form == Form::kBulkSlab || form == Form::kBulkRows) {
      asm volatile("cp.async.bulk.commit_group;");
      asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    }
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
template <Form form>
void measure(char const* name, float* out, int tiles, bool together) {
  int const blocks = 132, steps = 2000;
  cudaFuncSetAttribute(add_tiles<form>, cudaFuncAttributeMaxDynamicSharedMemorySize, kTileBytes);
  std::vector<float> ms;
  for (int i = 0; i < 5; ++i) {
    cudaEvent_t a, b;
    cudaEventCreate(&a);
    cudaEventCreate(&b);
    cudaEventRecord(a);
    add_tiles<form><<<blocks, 256, kTileBytes>>>(out, tiles, steps, together);
    cudaEventRecord(b);
    cudaEventSynchronize(b);
    float t;
    cudaEventElapsedTime(&t, a, b);
    ms.push_back(t);
  }
  std::sort(ms.begin(), ms.end());
  printf("%-12s %4d MB %-8s %6.2f TB/s  %s\n", name, int(int64_t(tiles) * kTileBytes >> 20),
         together ? "together" : "apart", 1e-9 * blocks * steps * kTileBytes / ms[2],
         cudaGetErrorString(cudaGetLastError()));
}
int main() {
  float* out;
  cudaMalloc(&out, int64_t(4) << 30);
  cudaMemset(out, 0, int64_t(4) << 30);
  for (int mb : {4, 16, 32, 64, 1024, 4096}) {
    int const tiles = int((int64_t(mb) << 20) / kTileBytes);
    measure<Form::kBulkSlab>("bulk slab", out, tiles, false);
    measure<Form::kBulkSlab>("bulk slab", out, tiles, true);
    measure<Form::kBulkRows>("bulk rows", out, tiles, false);
    measure<Form::kVectorSlab>("vector slab", out, tiles, false);
    measure<Form::kVectorSlab>("vector slab", out, tiles, true);
    measure<Form::kVectorRows>("vector rows", out, tiles, false);
  }
}
