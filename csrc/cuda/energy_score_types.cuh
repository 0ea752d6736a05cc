// What the energy score kernels share: arguments, storage types and a lane's piece of a row.
// Free of torch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/expected_distance.h"
#include "cuda/shared_memory.cuh"

// A loop over registers must unroll, or its array moves to local memory. A macro, because a pragma
// is not a template; the host executor's compiler needs none.
#ifdef CALM_SIMT
#define CALM_UNROLL
#else
#define CALM_UNROLL _Pragma("unroll")
#endif

namespace calm {

constexpr unsigned kAllLanes = 0xffffffffu;

// 16-bit storage. Kernels compute in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename In>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename In>
using Compute = typename ComputeType<In>::type;

__device__ inline float half_to_float(uint16_t bits) {
#ifdef CALM_SIMT
  _Float16 value;
  std::memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#endif
}

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ inline float widen(Float16 value) { return half_to_float(value.bits); }

// Two floats rounded to the nearest 16-bit values; `low` is the first in memory.
template <typename In>
__device__ inline uint32_t pack_pair(float low, float high) {
#ifdef CALM_SIMT
  uint16_t bits[2];
  const float values[2] = {low, high};
  for (int i = 0; i < 2; ++i) {
    if constexpr (std::is_same_v<In, BFloat16>) {
      const uint32_t word = __float_as_uint(values[i]);
      const bool is_nan = (word & 0x7fffffffu) > 0x7f800000u;
      bits[i] = static_cast<uint16_t>(is_nan ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16);
    } else {
      const _Float16 value = static_cast<_Float16>(values[i]);
      std::memcpy(&bits[i], &value, sizeof(value));
    }
  }
  return static_cast<uint32_t>(bits[0]) | static_cast<uint32_t>(bits[1]) << 16;
#else
  uint32_t word;
  if constexpr (std::is_same_v<In, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#endif
}

template <typename In>
__device__ inline In narrow(Compute<In> value) {
  if constexpr (std::is_same_v<In, Compute<In>>) {
    return value;
  } else {
    return In{static_cast<uint16_t>(pack_pair<In>(value, 0.0f))};
  }
}

// `kCount` neighbouring elements of a row as they lie in memory.
template <typename In, int kCount>
struct alignas(sizeof(In) * kCount) Piece {
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(In));
  static constexpr int kWords = kCount / kPerWord;
  uint32_t word[kWords];

  __device__ float operator[](int i) const {
    if constexpr (std::is_same_v<In, float>) {
      return __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<In, BFloat16>) {
      return __uint_as_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000u);
    } else {
      return half_to_float(static_cast<uint16_t>(i % 2 == 0 ? word[i / 2] : word[i / 2] >> 16));
    }
  }

  // Hides from the compiler that the words are still the same. Otherwise it keeps what it derived
  // from them, twice the registers, for a second use far away instead of unpacking again.
  __device__ void forget_unpacked() {
#ifndef CALM_SIMT
    CALM_UNROLL
    for (int w = 0; w < kWords; ++w) asm volatile("" : "+r"(word[w]));
#endif
  }

  // Replaces the elements of one word.
  __device__ void set_word(int w, const float (&values)[kPerWord]) {
    if constexpr (std::is_same_v<In, float>) {
      word[w] = __float_as_uint(values[0]);
    } else {
      word[w] = pack_pair<In>(values[0], values[1]);
    }
  }

  __device__ void set(const float (&values)[kCount]) {
    CALM_UNROLL
    for (int w = 0; w < kWords; ++w) {
      float part[kPerWord];
      CALM_UNROLL
      for (int i = 0; i < kPerWord; ++i) part[i] = values[w * kPerWord + i];
      set_word(w, part);
    }
  }
};

// Zeros where the piece does not exist.
template <typename In, int kCount>
__device__ inline Piece<In, kCount> load_piece(const In* address, bool exists) {
  Piece<In, kCount> piece{};
  if (!exists) return piece;
#ifdef CALM_SIMT
  piece = *reinterpret_cast<const Piece<In, kCount>*>(address);
#else
  // CUDA's own vectors: one instruction for certain.
  if constexpr (sizeof(piece) == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(address);
    piece.word[0] = words.x;
    piece.word[1] = words.y;
    piece.word[2] = words.z;
    piece.word[3] = words.w;
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(address);
    piece.word[0] = words.x;
    piece.word[1] = words.y;
  }
#endif
  return piece;
}

template <typename In, int kCount>
__device__ inline void store_piece(In* address, const Piece<In, kCount>& piece) {
#ifdef CALM_SIMT
  *reinterpret_cast<Piece<In, kCount>*>(address) = piece;
#else
  // Written out, because the compiler takes stores of its vectors apart.
  const size_t global = __cvta_generic_to_global(address);
  if constexpr (sizeof(piece) == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(piece.word[0]),
                 "r"(piece.word[1]), "r"(piece.word[2]), "r"(piece.word[3])
                 : "memory");
  } else {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(global), "r"(piece.word[0]),
                 "r"(piece.word[1])
                 : "memory");
  }
#endif
}

// The same for values: what was computed from them is computed again instead of being kept.
template <int kRows, int kColumns>
__device__ inline void forget([[maybe_unused]] float (&values)[kRows][kColumns]) {
#ifndef CALM_SIMT
  CALM_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CALM_UNROLL
    for (int j = 0; j < kColumns; ++j) asm volatile("" : "+f"(values[i][j]));
  }
#endif
}

// Zero, but not to the compiler's knowledge: what is loaded from an address with it added is loaded
// there and then, instead of being kept in registers from an earlier load.
__device__ inline int hidden_zero() {
  int zero = 0;
#ifndef CALM_SIMT
  asm volatile("" : "+r"(zero));
#endif
  return zero;
}

// Rows (n, p) of a [N, P, D] tensor, or of [P, D] with n = 0; any strides, in elements.
template <typename In>
struct Rows {
  const In* data;
  int64_t row_stride;
  int64_t position_stride;
  int64_t element_stride;

  CALM_HOST_DEVICE const In* row(int64_t n, int64_t p) const {
    return data + n * row_stride + p * position_stride;
  }
  __device__ Compute<In> at(int64_t n, int64_t p, int64_t d) const {
    return widen(row(n, p)[d * element_stride]);
  }
};

struct EnergyShape {
  int64_t num_samples;
  int64_t num_positions;
  int64_t size;
  int64_t num_targets;  // 0: the closed form
};

// One call. Gradients are dense; one that is not wanted is null. Targets are drawn where `seed` is
// not null, read from `targets` otherwise.
template <typename In>
struct EnergyArguments {
  using T = Compute<In>;

  EnergyShape shape;
  Rows<In> samples;
  Rows<In> mean;
  Rows<In> log_std;
  Rows<In> targets;
  const int64_t* seed;
  T* score;
  In* grad_samples;
  In* grad_mean;
  In* grad_log_std;
  In* grad_targets;
  // Accumulators of the block kernel, [blocks, N + 2, D], where a gradient's dtype cannot hold
  // them and more than one batch of targets is summed; else null.
  T* workspace;
  PowerConstants<T> constants;
  T pair_weight;    // 2 / (N (N - 1))
  T target_weight;  // -2 / N, or -2 / (N M)

  // Start of row (n, p) in a dense gradient.
  CALM_HOST_DEVICE int64_t dense(int64_t n, int64_t p) const {
    return (n * shape.num_positions + p) * shape.size;
  }
};

// exp(log_std)^2. The argument's rounding is no worse than that of log_std itself.
__device__ inline float variance_of(float log_std) {
  constexpr float kTwoLog2E = 2.88539008177792681f;
#ifdef CALM_SIMT
  return std::exp2(kTwoLog2E * log_std);
#else
  float variance;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(variance) : "f"(kTwoLog2E * log_std));
  return variance;
#endif
}

// x to the power -1/2, x > 0.
__device__ inline float inverse_square_root(float x) { return rsqrtf(x); }
__device__ inline double inverse_square_root(double x) { return rsqrt(x); }

}  // namespace calm
