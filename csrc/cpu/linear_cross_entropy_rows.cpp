// Passes over one row of logits, in vector lanes.
//
// A row of logits comes from the matmul through the last cache: the first pass brings it into L1 or
// L2 (64 KiB at V=16384) and finds its largest entry, the second turns it into exponentials and
// their sum; both together cost about a twentieth of the matmul that made the row (H=256). The list
// of a row and the factor of a dense one are passes over what is in the cache.
//
// exp: n = round(x / ln 2), exp(x - n ln 2) by a polynomial of degree 6 whose error of 3e-9 drowns
// in the rounding: within 1.2e-7 (2 ulp) relative over [-87.3, 0]; 0 below.

#include "cpu/linear_cross_entropy_rows.h"

#include <bit>
#include <cmath>
#include <limits>

#include "cpu/lanes.h"
#include "cpu/multiversion.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define CALM_AVX512_LISTS
#include <immintrin.h>
#endif

namespace calm {
namespace {

typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));

constexpr float kLogSmallestNormal = -87.33654f;

// In place: returning a vector would tie the ABI to its width.
CALM_INLINE void exponentiate(Vector<float>& x) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector<float> shifted = x * 1.44269504f + kToInteger;
  const Vector<float> n = shifted - kToInteger;
  // ln 2 in two parts; n times the first is exact.
  const Vector<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector<float> p = r * 1.3814539e-3f + 8.3687454e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 4.9999994e-1f;
  const Vector<float> mantissa = (p * r) * r + r + 1.0f;
  const IntVector exponent =
      reinterpret_cast<IntVector>(shifted) - (std::bit_cast<int32_t>(kToInteger) - 127);
  const IntVector power = exponent << 23;
  const Vector<float> e = mantissa * reinterpret_cast<Vector<float>>(power);
  // A NaN is not below anything and stays.
  x = x < kLogSmallestNormal ? Vector<float>{} : e;
}

CALM_INLINE void exponentiate(Vector<double>& x) {
  for (int i = 0; i < Lanes<double>::kCount; ++i) x[i] = std::exp(x[i]);
}

template <typename T>
CALM_INLINE void pad(T* row, int64_t vocab_size, int64_t padded) {
  for (int64_t v = vocab_size; v < padded; ++v) row[v] = -std::numeric_limits<T>::infinity();
}

template <typename T>
CALM_INLINE T largest_lane(const Vector<T>& v) {
  T largest = v[0];
  for (int i = 1; i < Lanes<T>::kCount; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

// The largest entry; NaN if there is one.
template <typename T>
CALM_INLINE T largest_of(T* row, const T* bias, int64_t padded) {
  constexpr int kCount = Lanes<T>::kCount;
  constexpr int kChains = static_cast<int>(kRowLanes) / kCount;
  Vector<T> largest[kChains];
  Vector<T> poison[kChains];  // 0, or NaN from the first NaN on
  for (int c = 0; c < kChains; ++c) {
    largest[c] = Vector<T>{} - std::numeric_limits<T>::infinity();
    poison[c] = Vector<T>{};
  }
  for (int64_t v = 0; v < padded; v += kRowLanes) {
    for (int c = 0; c < kChains; ++c) {
      Vector<T>& z = *vectors(row + v + c * kCount);
      if (bias != nullptr) z += *vectors(bias + v + c * kCount);
      largest[c] = z > largest[c] ? z : largest[c];
      poison[c] = z == z ? poison[c] : z;
    }
  }
  T top = -std::numeric_limits<T>::infinity();
  T nan = 0;
  for (int c = 0; c < kChains; ++c) {
    const T chain = largest_lane<T>(largest[c]);
    top = chain > top ? chain : top;
    nan += sum_lanes<T>(poison[c]);
  }
  return nan == nan ? top : nan;
}

// Whether torch.argmax of the row is the target: no NaN and nothing as large before it.
template <typename T>
CALM_INLINE bool is_first_largest(const T* row, T top, int64_t target) {
  if (top != top) {
    if (row[target] == row[target]) return false;
    for (int64_t v = 0; v < target; ++v) {
      if (row[v] != row[v]) return false;
    }
    return true;
  }
  if (row[target] != top) return false;
  int equal = 0;
  for (int64_t v = 0; v < target; ++v) equal |= row[v] == top;
  return equal == 0;
}

template <typename T>
CALM_INLINE RowSoftmax<T> softmax(T* row, const T* bias, int64_t vocab_size, int64_t padded,
                                  int64_t target) {
  constexpr int kCount = Lanes<T>::kCount;
  constexpr int64_t kStep = 4 * kCount;
  pad(row, vocab_size, padded);
  const T top = largest_of(row, bias, padded);
  RowSoftmax<T> result{top, T(0), row[target], is_first_largest(row, top, target)};
  Vector<T> sums[4] = {};
  int64_t v = 0;
  for (; v + kStep <= padded; v += kStep) {
    for (int c = 0; c < 4; ++c) {
      Vector<T>& z = *vectors(row + v + c * kCount);
      z -= top;
      exponentiate(z);
      sums[c] += z;
    }
  }
  for (; v < padded; v += kCount) {
    Vector<T>& z = *vectors(row + v);
    z -= top;
    exponentiate(z);
    sums[0] += z;
  }
  result.total = sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return result;
}

template <typename T>
CALM_INLINE void exponentials(T* row, const T* bias, int64_t vocab_size, int64_t padded, T top,
                              T factor) {
  pad(row, vocab_size, padded);
  for (int64_t v = 0; v < padded; v += Lanes<T>::kCount) {
    Vector<T>& z = *vectors(row + v);
    if (bias != nullptr) z += *vectors(bias + v);
    z -= top;
    exponentiate(z);
    z *= factor;
  }
}

template <typename T>
CALM_INLINE void multiply(T* row, int64_t padded, T factor) {
  for (int64_t v = 0; v < padded; v += Lanes<T>::kCount) *vectors(row + v) *= factor;
}

template <typename T>
CALM_INLINE int64_t list_lane_by_lane(const T* row, int64_t padded, T threshold, int32_t* columns) {
  int64_t count = 0;
  for (int64_t v = 0; v < padded; v += kRowLanes) {
    int any = 0;
    for (int64_t i = 0; i < kRowLanes; ++i) any |= row[v + i] > threshold;
    if (any == 0) continue;
    for (int64_t i = 0; i < kRowLanes; ++i) {
      columns[count] = static_cast<int32_t>(v + i);
      count += row[v + i] > threshold;
    }
    if (count > kListCapacity) return kListCapacity + 1;
  }
  return count;
}

template <typename T>
CALM_INLINE void add_product(T* __restrict out, const T* __restrict x, T factor, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] += factor * x[i];
}

CALM_MULTIVERSION int64_t list_in_any_lanes(const float* row, int64_t padded, float threshold,
                                            int32_t* columns) {
  return list_lane_by_lane(row, padded, threshold, columns);
}

#ifdef CALM_AVX512_LISTS
// One comparison and one branch for 16 entries. Compressed into a register and stored whole: a
// masked compressing store is microcode on some CPUs.
__attribute__((target("avx512f"))) int64_t list_compressed(const float* row, int64_t padded,
                                                           float threshold, int32_t* columns) {
  const __m512 limit = _mm512_set1_ps(threshold);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t count = 0;
  for (int64_t v = 0; v < padded; v += kRowLanes) {
    const __mmask16 above = _mm512_cmp_ps_mask(_mm512_load_ps(row + v), limit, _CMP_GT_OQ);
    if (above == 0) continue;
    const __m512i found = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(v)));
    _mm512_storeu_si512(columns + count, _mm512_maskz_compress_epi32(above, found));
    count += std::popcount(static_cast<uint16_t>(above));
    if (count > kListCapacity) return kListCapacity + 1;
  }
  return count;
}
#endif

}  // namespace

CALM_MULTIVERSION RowSoftmax<float> softmax_row(float* row, const float* bias, int64_t vocab_size,
                                                int64_t padded, int64_t target) {
  return softmax(row, bias, vocab_size, padded, target);
}

CALM_MULTIVERSION RowSoftmax<double> softmax_row(double* row, const double* bias,
                                                 int64_t vocab_size, int64_t padded,
                                                 int64_t target) {
  return softmax(row, bias, vocab_size, padded, target);
}

CALM_MULTIVERSION void scaled_exponentials(float* row, const float* bias, int64_t vocab_size,
                                           int64_t padded, float top, float factor) {
  exponentials(row, bias, vocab_size, padded, top, factor);
}

CALM_MULTIVERSION void scaled_exponentials(double* row, const double* bias, int64_t vocab_size,
                                           int64_t padded, double top, double factor) {
  exponentials(row, bias, vocab_size, padded, top, factor);
}

CALM_MULTIVERSION void scale_row(float* row, int64_t padded, float factor) {
  multiply(row, padded, factor);
}

CALM_MULTIVERSION void scale_row(double* row, int64_t padded, double factor) {
  multiply(row, padded, factor);
}

int64_t list_above(const float* row, int64_t padded, float threshold, int32_t* columns) {
#ifdef CALM_AVX512_LISTS
  static const bool has_avx512 = __builtin_cpu_supports("avx512f");
  if (has_avx512) return list_compressed(row, padded, threshold, columns);
#endif
  return list_in_any_lanes(row, padded, threshold, columns);
}

CALM_MULTIVERSION int64_t list_above(const double* row, int64_t padded, double threshold,
                                     int32_t* columns) {
  return list_lane_by_lane(row, padded, threshold, columns);
}

CALM_MULTIVERSION void add_scaled(float* out, const float* x, float factor, int64_t size) {
  add_product(out, x, factor, size);
}

CALM_MULTIVERSION void add_scaled(double* out, const double* x, double factor, int64_t size) {
  add_product(out, x, factor, size);
}

}  // namespace calm
