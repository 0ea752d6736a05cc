// Philox uniforms and normals of many rows: the device code, free of torch.
//
// Mapping: a thread makes one block (four elements) of one row; threads of a warp take neighbouring
// blocks, so their stores are neighbouring 16-byte pieces where the row is aligned. Fewest bytes:
// the output, written once. Ten rounds of two multiplies a block: bound by stores for uniforms, by
// the logarithms and sines for normals.
#pragma once

#include <cstdint>

#include "common/normal.h"
#include "common/philox.h"

namespace calm {

constexpr int kRandomThreads = 256;

struct RandomShape {
  int64_t num_rows;
  int64_t count;  // elements of a row that are wanted, from `first` on
  int64_t first;
};

template <bool kNormal>
__global__ void __launch_bounds__(kRandomThreads)
    random_kernel(const int64_t* __restrict__ seed, const int64_t* __restrict__ rows,
                  float* __restrict__ out, const RandomShape shape, const uint32_t stream) {
  const int64_t first_block = shape.first / 4;
  const int64_t blocks_per_row = (shape.first + shape.count + 3) / 4 - first_block;
  const int64_t total = shape.num_rows * blocks_per_row;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRandomThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRandomThreads + threadIdx.x; i < total;
       i += step) {
    const int64_t r = i / blocks_per_row;
    const int64_t block = first_block + i % blocks_per_row;
    const PhiloxWords words = philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(rows[r]),
                                     static_cast<uint32_t>(block), static_cast<Stream>(stream));
    float values[4];
    if constexpr (kNormal) {
      box_muller(words, values);
    } else {
      for (int j = 0; j < 4; ++j) values[j] = to_uniform(words.word[j]);
    }
    for (int j = 0; j < 4; ++j) {
      const int64_t element = 4 * block + j - shape.first;
      if (element >= 0 && element < shape.count) out[r * shape.count + element] = values[j];
    }
  }
}

}  // namespace calm
