// What linear_argmax does with a tile of logits: the best of each row so far.
#pragma once

#include <cstdint>

namespace calm {

// The best logit of a row among those seen.
template <typename T>
struct Best {
  T rounded;      // as the matmul returned it
  T value;        // in full precision: T's
  int64_t index;  // negative: nothing seen yet
};

// Whether a goes before b: something before nothing, the first NaN before anything else, the larger
// logit, and among equal ones the lower index. A total order, so tiles may be joined in any.
template <typename T>
inline bool goes_before(const Best<T>& a, const Best<T>& b) {
  if (a.index < 0 || b.index < 0) return b.index < 0 && a.index >= 0;
  const bool nan_a = a.value != a.value;
  const bool nan_b = b.value != b.value;
  if (nan_a || nan_b) return nan_a && (!nan_b || a.index < b.index);
  if (a.rounded != b.rounded) return a.rounded > b.rounded;
  if (a.value != b.value) return a.value > b.value;
  return a.index < b.index;
}

// A tile of logits [rows, columns] of the vocabulary from `first` on.
template <typename T>
struct LogitTile {
  const T* logits;
  int64_t rows;
  int64_t columns;
  int64_t first;
};

// The operands of the logits of a bfloat16 tile, both with rows of `size` bfloat16 numbers.
struct Bfloat16Operands {
  const uint16_t* hidden;  // the tile's first row
  const uint16_t* weight;  // the tile's first column
  int64_t weight_stride;
  int64_t size;
};

// Takes a tile into account; tiles of one row come in rising order. bias, if any, starts at the
// tile's first column.
void scan_tile(const LogitTile<float>& tile, const float* bias, Best<float>* best);
void scan_tile(const LogitTile<double>& tile, const double* bias, Best<double>* best);

// The same for logits that were rounded to bfloat16: the columns whose rounded logit is the row's
// largest are compared by float32 dot products of their operands.
void scan_rounded_tile(const LogitTile<uint16_t>& tile, const Bfloat16Operands& operands,
                       Best<float>* best);

// 16-bit numbers as float32.
void widen_bfloat16(const uint16_t* source, int64_t count, float* target);
void widen_half(const uint16_t* source, int64_t count, float* target);

}  // namespace calm
