// Row maxima of tiles of logits, in vectors; a tile is in a cache when it comes here.
//
// A first pass over a row takes the maximum of its lanes and whether there is a NaN: one comparison
// and one selection a vector, so reading from the cache is the limit. A second pass looks for the
// column, and only where the row has a new best: about ln(tiles) times a row.

#include "cpu/linear_argmax_scan.h"

#include <bit>
#include <cstring>
#include <limits>

#include "cpu/lanes.h"
#include "cpu/multiversion.h"

namespace calm {
namespace {

constexpr int kUnroll = 4;

template <typename Vector, typename T>
CALM_INLINE void load(const T* from, Vector& to) {
  std::memcpy(&to, from, sizeof(Vector));
}

template <typename T>
CALM_INLINE T largest_lane(const Vector<T>& v) {
  T top = v[0];
  for (int i = 1; i < Lanes<T>::kCount; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

template <typename T>
struct RowMaximum {
  T top;  // of what is no NaN
  bool has_nan;
};

template <bool kBias, typename T>
CALM_INLINE RowMaximum<T> row_maximum(const T* row, const T* bias, int64_t count) {
  constexpr int kLanes = Lanes<T>::kCount;
  using V = Vector<T>;
  V top[kUnroll];
  for (auto& each : top) each = V{} - std::numeric_limits<T>::infinity();
  auto nan = top[0] != top[0];
  int64_t c = 0;
  for (; c + kUnroll * kLanes <= count; c += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      V v;
      load(row + c + u * kLanes, v);
      if constexpr (kBias) {
        V b;
        load(bias + c + u * kLanes, b);
        v += b;
      }
      nan |= v != v;
      top[u] = v > top[u] ? v : top[u];
    }
  }
  for (int u = 1; u < kUnroll; ++u) top[0] = top[u] > top[0] ? top[u] : top[0];
  RowMaximum<T> found{largest_lane<T>(top[0]), false};
  for (int i = 0; i < kLanes; ++i) found.has_nan |= nan[i] != 0;
  for (; c < count; ++c) {
    const T v = kBias ? row[c] + bias[c] : row[c];
    found.has_nan |= v != v;
    found.top = v > found.top ? v : found.top;
  }
  return found;
}

template <bool kBias, typename T>
CALM_INLINE void scan_rows(const LogitTile<T>& tile, const T* bias, Best<T>* best) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* row = tile.logits + r * tile.columns;
    Best<T>& so_far = best[r];
    const auto [top, has_nan] = row_maximum<kBias>(row, bias, tile.columns);
    // A NaN seen before stays; nothing seen yet loses even to minus infinity.
    const bool settled = so_far.index >= 0 && so_far.value != so_far.value;
    if (settled || !(has_nan || so_far.index < 0 || top > so_far.value)) continue;
    int64_t c = 0;
    for (; c < tile.columns; ++c) {
      const T v = kBias ? row[c] + bias[c] : row[c];
      if (has_nan ? v != v : v == top) break;
    }
    const T value = has_nan ? std::numeric_limits<T>::quiet_NaN() : top;
    so_far = {value, value, tile.first + c};
  }
}

// bfloat16 as integers. Keys order the numbers: negative ones have their other bits turned over, so
// that -0 is -1 and 0 is 0.
constexpr int16_t kMagnitude = 0x7fff;
constexpr int16_t kInfinity = 0x7f80;
constexpr int16_t kMinusZeroKey = -1;

CALM_INLINE int16_t key_of(int16_t bits) {
  return static_cast<int16_t>(bits ^ ((bits >> 15) & kMagnitude));
}

CALM_INLINE float to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

CALM_INLINE bool is_nan(int16_t bits) { return (bits & kMagnitude) > kInfinity; }

// The largest key of a row, with -0 taken for 0.
CALM_INLINE RowMaximum<int16_t> row_maximum_key(const uint16_t* row, int64_t count) {
  using V = Vector<int16_t>;
  constexpr int kLanes = Lanes<int16_t>::kCount;
  V top = V{} + std::numeric_limits<int16_t>::min();
  V magnitude = V{};
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    V v;
    load(row + c, v);
    const V m = v & kMagnitude;
    magnitude = m > magnitude ? m : magnitude;
    const V key = v ^ ((v >> 15) & kMagnitude);
    top = key > top ? key : top;
  }
  RowMaximum<int16_t> found{largest_lane<int16_t>(top),
                            largest_lane<int16_t>(magnitude) > kInfinity};
  for (; c < count; ++c) {
    const int16_t bits = static_cast<int16_t>(row[c]);
    found.has_nan |= is_nan(bits);
    found.top = key_of(bits) > found.top ? key_of(bits) : found.top;
  }
  if (found.top == kMinusZeroKey) found.top = 0;
  return found;
}

// In float32 and always in the same order, so that equal operands have equal products.
CALM_INLINE float dot(const uint16_t* a, const uint16_t* b, int64_t count) {
  using Words = Vector<uint32_t>;
  using V = Vector<float>;
  constexpr int kNumbers = 2 * Lanes<uint32_t>::kCount;
  constexpr uint32_t kUpper = 0xffff0000u;
  V low = V{};
  V high = V{};
  int64_t k = 0;
  for (; k + kNumbers <= count; k += kNumbers) {
    Words x, y;
    load(a + k, x);
    load(b + k, y);
    low += (V)(x << 16) * (V)(y << 16);
    high += (V)(x & kUpper) * (V)(y & kUpper);
  }
  float sum = sum_lanes<float>(low + high);
  for (; k < count; ++k) sum += to_float(a[k]) * to_float(b[k]);
  return sum;
}

CALM_INLINE void scan_rounded_rows(const LogitTile<uint16_t>& tile,
                                   const Bfloat16Operands& operands, Best<float>* best) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const uint16_t* row = tile.logits + r * tile.columns;
    Best<float>& so_far = best[r];
    if (so_far.index >= 0 && so_far.value != so_far.value) continue;
    const auto [top, has_nan] = row_maximum_key(row, tile.columns);
    if (has_nan) {
      int64_t c = 0;
      while (!is_nan(static_cast<int16_t>(row[c]))) ++c;
      constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
      so_far = {kNan, kNan, tile.first + c};
      continue;
    }
    // A key's bits are those of a key's key.
    const float rounded = to_float(static_cast<uint16_t>(key_of(top)));
    if (so_far.index >= 0 && rounded < so_far.rounded) continue;
    if (so_far.index < 0 || rounded > so_far.rounded) so_far = {rounded, 0.0f, -1};
    for (int64_t c = 0; c < tile.columns; ++c) {
      if (to_float(row[c]) != rounded) continue;
      const float value = dot(operands.hidden + r * operands.size,
                              operands.weight + c * operands.weight_stride, operands.size);
      if (so_far.index < 0 || value > so_far.value) so_far = {rounded, value, tile.first + c};
    }
  }
}

}  // namespace

CALM_MULTIVERSION
void scan_tile(const LogitTile<float>& tile, const float* bias, Best<float>* best) {
  bias != nullptr ? scan_rows<true>(tile, bias, best) : scan_rows<false>(tile, bias, best);
}

CALM_MULTIVERSION
void scan_tile(const LogitTile<double>& tile, const double* bias, Best<double>* best) {
  bias != nullptr ? scan_rows<true>(tile, bias, best) : scan_rows<false>(tile, bias, best);
}

CALM_MULTIVERSION
void scan_rounded_tile(const LogitTile<uint16_t>& tile, const Bfloat16Operands& operands,
                       Best<float>* best) {
  scan_rounded_rows(tile, operands, best);
}

CALM_MULTIVERSION
void widen_bfloat16(const uint16_t* source, int64_t count, float* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = to_float(source[i]);
}

CALM_MULTIVERSION
void widen_half(const uint16_t* source, int64_t count, float* target) {
  // Exponent and mantissa move up into float32's places and 2^112 makes up for the difference of
  // the biases, subnormal numbers included; the largest exponent stays the largest.
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t sign = static_cast<uint32_t>(source[i] & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(source[i] & 0x7fffu) << 13;
    const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
    const uint32_t number = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled;
    target[i] = std::bit_cast<float>(sign | number);
  }
}

}  // namespace calm
