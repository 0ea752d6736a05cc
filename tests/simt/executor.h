// Runs CUDA kernels on the CPU, compiled as C++ from the very source that nvcc compiles.
//
// A block is a set of fibers, one a thread, on one OS thread. A fiber runs until it meets a barrier
// or a warp collective; which fiber runs next is drawn from a seed, so a missing barrier shows as a
// wrong value under some seed. Shared memory is poisoned and of exact size; what can never continue
// (a barrier that part of a block skips, a collective whose lanes never come) is an error and not a
// hang. Blocks run one after another, in an order drawn from the seed as well.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define CALM_SIMT 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

struct Options {
  uint64_t seed = 0;            // order of fibers and of blocks
  unsigned char poison = 0xa5;  // byte that fills shared memory before a block starts
};

struct Thread;

// The index of the running thread and block; only valid inside a kernel.
const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();
const dim3& grid_size();

// Suspends the running thread until all live threads of its block have come.
void block_barrier();

enum class Collective : int { kBarrier, kBallot, kShuffle, kReduce };

// Suspends the running thread until every lane of `mask` has come to the same kind of collective,
// and returns the values that the lanes brought (zero for lanes outside the mask).
std::array<uint64_t, 32> exchange(uint32_t mask, uint64_t value, Collective kind);

// The lane of the running thread.
int lane();

void* shared_bytes(const char* file, int line, size_t bytes, size_t alignment);
void* dynamic_shared_bytes();

// A block's shared array, one for each place in the source that declares it.
template <typename T>
T* shared_array(const char* file, int line, size_t count) {
  return static_cast<T*>(shared_bytes(file, line, count * sizeof(T), alignof(T)));
}

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared_bytes());
}

// Runs `kernel` for every thread of the grid. Throws std::runtime_error on a barrier that can never
// be passed.
void launch(dim3 grid, dim3 block, size_t dynamic_shared, const Options& options,
            const std::function<void()>& kernel);

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T shuffle(uint32_t mask, T value, int source) {
  const auto values = exchange(mask, to_bits(value), Collective::kShuffle);
  const bool from_other = source >= 0 && source < 32 && ((mask >> source) & 1u) != 0;
  return from_other ? from_bits<T>(values[static_cast<size_t>(source)]) : value;
}

}  // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())

inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  simt::exchange(mask, 0, simt::Collective::kBarrier);
}
inline unsigned __ballot_sync(uint32_t mask, int predicate) {
  const auto votes = simt::exchange(mask, predicate != 0, simt::Collective::kBallot);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) result |= static_cast<unsigned>(votes[i]) << i;
  return result;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source) {
  return simt::shuffle(mask, value, source & 31);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return simt::shuffle(mask, value, simt::lane() ^ lanes);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta) {
  return simt::shuffle(mask, value, simt::lane() + static_cast<int>(delta));
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta) {
  return simt::shuffle(mask, value, simt::lane() - static_cast<int>(delta));
}

// Fibers switch at barriers only, so a plain read-modify-write is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}
template <typename T>
T atomicMax(T* address, T value) {
  return std::exchange(*address, std::max(*address, value));
}
template <typename T>
T atomicMin(T* address, T value) {
  return std::exchange(*address, std::min(*address, value));
}
template <typename T>
T atomicCAS(T* address, T expected, T desired) {
  const T old = *address;
  if (old == expected) *address = desired;
  return old;
}

inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __ffs(int value) {
  return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1;
}
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
