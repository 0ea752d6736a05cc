// Small kernels, right and wrong on purpose, that show what the executor catches.
#pragma once

#include "cuda/shared_memory.cuh"
#include "executor.h"

namespace simt_self_test {

constexpr int kBlock = 64;

// out[block] = sum of the block's 64 values, by a tree in shared memory. With `barriers` false the
// tree reads what other threads may not have written yet.
inline void block_sum(const float* values, float* out, bool barriers) {
  CALM_SHARED_ARRAY(float, partial, kBlock);
  const unsigned t = threadIdx.x;
  partial[t] = values[blockIdx.x * kBlock + t];
  for (unsigned width = kBlock / 2; width > 0; width /= 2) {
    if (barriers) __syncthreads();
    if (t < width) partial[t] += partial[t + width];
  }
  if (t == 0) out[blockIdx.x] = partial[0];
}

// The same by warp shuffles, and an atomic across warps.
inline void warp_sum(const float* values, float* out) {
  float value = values[blockIdx.x * kBlock + threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  if (threadIdx.x % 32 == 0) atomicAdd(&out[blockIdx.x], value);
}

// Reads shared memory that nothing wrote.
inline void read_before_write(float* out) {
  CALM_DYNAMIC_SHARED_ARRAY(unsigned char, bytes);
  if (threadIdx.x == 0) out[0] = static_cast<float>(bytes[0]);
}

// Half of the block skips a barrier that the other half waits at, by waiting for its warp instead.
inline void divergent_barrier() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// One element past a shared array: only the address sanitizer sees it.
inline void out_of_bounds(float* out) {
  CALM_SHARED_ARRAY(float, partial, kBlock);
  partial[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = partial[1];
}

}  // namespace simt_self_test
