// The inner loop of float32 products on AVX-512: up to 12 x 32 sums in registers.
//
// Of one step of the sum, a tile of twelve rows loads two registers of the right operand and
// broadcasts twelve numbers of the left one, so 24 multiply-adds meet 14 loads.
#pragma once

#include <cstdint>

namespace calm {

constexpr int kTileRows = 12;
constexpr int kTileColumns = 32;

// Rows of a left operand: number k of row i at data[i * row_stride + k * step_stride].
struct LeftRows {
  const float* data;
  int64_t row_stride;
  int64_t step_stride;
};

// tile [num_rows, 32] = the product of the rows with panel [num_steps, 32], or that added to it.
// 1 to kTileRows rows. Sums go from the first step to the last, whatever the number of rows.
void multiply_tile(int64_t num_rows, const LeftRows& left, const float* panel, int64_t num_steps,
                   bool adds, float* tile);

}  // namespace calm
