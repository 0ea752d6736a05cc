// Vector lanes: GNU vectors of 64 bytes and sums over them, for kernels in CALM_MULTIVERSION
// clones.
#pragma once

#include <cmath>

#include "cpu/normal.h"

namespace calm {

constexpr int kVectorBytes = 64;

template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(T));
};

template <typename T>
using Vector = typename Lanes<T>::Vector;

#define CALM_INLINE [[gnu::always_inline]] inline

template <typename T>
CALM_INLINE const Vector<T>* vectors(const T* row) {
  return reinterpret_cast<const Vector<T>*>(row);
}

template <typename T>
CALM_INLINE Vector<T>* vectors(T* row) {
  return reinterpret_cast<Vector<T>*>(row);
}

template <typename T>
CALM_INLINE T sum_lanes(const Vector<T>& v) {
  // Halves onto halves: four additions deep for 16 lanes, where a loop over them is sixteen.
  T part[Lanes<T>::kCount];
  for (int i = 0; i < Lanes<T>::kCount; ++i) part[i] = v[i];
#pragma GCC unroll 4
  for (int width = Lanes<T>::kCount / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}

// Sum of ln(1 + q) over lanes, accurate for small q: what 1 + q rounds away is put back as a
// factor.
template <typename T>
CALM_INLINE T sum_of_logs_one_plus(const Vector<T>& q) {
  if constexpr (sizeof(T) == sizeof(float)) {
    Vector<T> logs;
    for (int i = 0; i < Lanes<T>::kCount; ++i) {
      const T one_plus = T(1) + q[i];
      const T above = one_plus - T(1);
      logs[i] = above == T(0) ? q[i] : fast_log(one_plus) * (q[i] / above);
    }
    return sum_lanes<T>(logs);
  } else {
    T total = 0;
    for (int i = 0; i < Lanes<T>::kCount; ++i) total += std::log1p(q[i]);
    return total;
  }
}

}  // namespace calm
