// The tiles of tile_product.h, a function for every height.

#include "cpu/tile_product.h"

#include "cpu/lanes.h"
#include "cpu/multiversion.h"

// Everything that returns a vector is inlined, so no call depends on how vectors are returned.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace calm {
namespace {

typedef Vector<float> Lanes16;
typedef float Unaligned16 __attribute__((vector_size(64), aligned(4)));
constexpr int kHalf = kTileColumns / 2;

CALM_INLINE Lanes16 load(const float* from) { return *reinterpret_cast<const Unaligned16*>(from); }
CALM_INLINE void store(float* to, const Lanes16& v) { *reinterpret_cast<Unaligned16*>(to) = v; }

template <int kRows>
CALM_INLINE void multiply_rows(const LeftRows& left, const float* panel, int64_t num_steps,
                               bool adds, float* tile) {
  Lanes16 sums[kRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    sums[i][0] = Lanes16{};
    sums[i][1] = Lanes16{};
  }
  const float* factors = left.data;
  const int64_t row_stride = left.row_stride;
  for (int64_t k = 0; k < num_steps; ++k) {
    const Lanes16 low = load(panel);
    const Lanes16 high = load(panel + kHalf);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const float factor = factors[i * row_stride];
      sums[i][0] += factor * low;
      sums[i][1] += factor * high;
    }
    factors += left.step_stride;
    panel += kTileColumns;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    float* const row = tile + i * kTileColumns;
    store(row, adds ? load(row) + sums[i][0] : sums[i][0]);
    store(row + kHalf, adds ? load(row + kHalf) + sums[i][1] : sums[i][1]);
  }
}

// One clone an instruction set: attributes do not reach the instances of a template.
#define CALM_MULTIPLY_ROWS(kRows)                                                      \
  CALM_MULTIVERSION void multiply_##kRows(const LeftRows& left, const float* panel,    \
                                          int64_t num_steps, bool adds, float* tile) { \
    multiply_rows<kRows>(left, panel, num_steps, adds, tile);                          \
  }
CALM_MULTIPLY_ROWS(1)
CALM_MULTIPLY_ROWS(2)
CALM_MULTIPLY_ROWS(3)
CALM_MULTIPLY_ROWS(4)
CALM_MULTIPLY_ROWS(5)
CALM_MULTIPLY_ROWS(6)
CALM_MULTIPLY_ROWS(7)
CALM_MULTIPLY_ROWS(8)
CALM_MULTIPLY_ROWS(9)
CALM_MULTIPLY_ROWS(10)
CALM_MULTIPLY_ROWS(11)
CALM_MULTIPLY_ROWS(12)

}  // namespace

void multiply_tile(int64_t num_rows, const LeftRows& left, const float* panel, int64_t num_steps,
                   bool adds, float* tile) {
  using Multiply = void (*)(const LeftRows&, const float*, int64_t, bool, float*);
  static constexpr Multiply kOfRows[kTileRows] = {
      multiply_1, multiply_2, multiply_3, multiply_4,  multiply_5,  multiply_6,
      multiply_7, multiply_8, multiply_9, multiply_10, multiply_11, multiply_12};
  kOfRows[num_rows - 1](left, panel, num_steps, adds, tile);
}

}  // namespace calm
