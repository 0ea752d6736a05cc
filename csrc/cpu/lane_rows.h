// Rows of tensors in vector lanes: loads and stores that widen and narrow, a walk over a row, and
// the exponential. For kernels in CALM_MULTIVERSION clones. S is the dtype in memory; the
// arithmetic is in ComputeOf<S>.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/lanes.h"

// Everything that returns a vector is inlined, so no call depends on how vectors are returned.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace calm {

// float, or double for double.
template <typename S>
using ComputeOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename S>
constexpr int kRowLanes = Lanes<ComputeOf<S>>::kCount;

// The first `count` of a vector's elements from memory; the others are zero.
template <typename S>
CALM_INLINE Vector<ComputeOf<S>> load_lanes(const S* from, int count = kRowLanes<S>) {
  using T = ComputeOf<S>;
  Vector<T> v{};
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(&v, from, static_cast<size_t>(count) * sizeof(T));
  } else {
    T wide[kRowLanes<S>] = {};
    for (int i = 0; i < count; ++i) wide[i] = static_cast<T>(from[i]);
    std::memcpy(&v, wide, sizeof(v));
  }
  return v;
}

template <typename S>
CALM_INLINE void store_lanes(S* to, const Vector<ComputeOf<S>>& v, int count = kRowLanes<S>) {
  using T = ComputeOf<S>;
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(to, &v, static_cast<size_t>(count) * sizeof(T));
  } else {
    T wide[kRowLanes<S>];
    std::memcpy(wide, &v, sizeof(v));
    for (int i = 0; i < count; ++i) to[i] = static_cast<S>(wide[i]);
  }
}

// step(offset, count) over a row: full vectors with a constant count, then the rest.
template <typename S, typename Step>
CALM_INLINE void for_lanes(int64_t size, const Step& step) {
  int64_t i = 0;
  for (; i + kRowLanes<S> <= size; i += kRowLanes<S>) {
    step(i, std::integral_constant<int, kRowLanes<S>>());
  }
  if (i < size) step(i, static_cast<int>(size - i));
}

// e^x; infinity above 88, 1e-38 below -87. A polynomial of degree 6 after the nearest multiple of
// ln 2 is taken off: relative error below 1.5e-7.
CALM_INLINE Vector<float> exponential_lanes(const Vector<float>& x_in) {
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  constexpr float kLargest = 88.0f;
  constexpr float kSmallest = -87.0f;
  const Vector<float> x = x_in < kSmallest ? Vector<float>{} + kSmallest : x_in;
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
  constexpr float kRound = 12582912.0f;
  const Vector<float> shifted = x * 1.44269504088896341f + kRound;
  const Vector<float> n = shifted - kRound;
  const Vector<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  Integers bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  // The low bits of `shifted` are n.
  bits = (bits + 127) << 23;
  Vector<float> power;
  std::memcpy(&power, &bits, sizeof(power));
  return x_in > kLargest ? Vector<float>{} + std::numeric_limits<float>::infinity() : p * power;
}

CALM_INLINE Vector<double> exponential_lanes(const Vector<double>& x) {
  Vector<double> result;
  for (int i = 0; i < Lanes<double>::kCount; ++i) result[i] = std::exp(x[i]);
  return result;
}

}  // namespace calm
