// Philox uniforms and normals of many rows, on CPUs.
//
// Fewest bytes: the output, written once (4 bytes an element). A group of 16 blocks (64 elements)
// is made at a time in vector lanes; whatever part of a row was asked for is copied out of its
// groups.

#include <algorithm>
#include <cstring>

#include "cpu/multiversion.h"
#include "cpu/normal.h"
#include "cpu/registration.h"

namespace calm {
namespace {

constexpr int64_t kGroup = 4 * kPhiloxLanes;
// Elements per task: about 20 microseconds of work.
constexpr int64_t kGrainElements = 1 << 14;

[[gnu::always_inline]] inline void uniforms_of_blocks(uint64_t seed, uint64_t row,
                                                      uint32_t first_block, Stream stream,
                                                      float* __restrict out) {
  alignas(64) uint32_t words[4][kPhiloxLanes];
  philox_lanes(seed, row, first_block, stream, words);
  for (int l = 0; l < kPhiloxLanes; ++l) {
    for (int j = 0; j < 4; ++j) out[4 * l + j] = to_uniform(words[j][l]);
  }
}

CALM_MULTIVERSION
void fill_uniform(uint64_t seed, uint64_t row, uint32_t block, uint32_t stream, float* out) {
  uniforms_of_blocks(seed, row, block, static_cast<Stream>(stream), out);
}

CALM_MULTIVERSION
void fill_normal(uint64_t seed, uint64_t row, uint32_t block, uint32_t stream, float* out) {
  normals_of_blocks(seed, row, block, static_cast<Stream>(stream), out);
}

using Fill = void (*)(uint64_t, uint64_t, uint32_t, uint32_t, float*);

Tensor fill_rows(const Tensor& seed_tensor, const Tensor& rows_in, int64_t count, int64_t stream,
                 int64_t first, Fill fill) {
  const Tensor rows = torch::stable::contiguous(rows_in);
  const int64_t num_rows = rows.size(0);
  Tensor out = torch::stable::new_empty(rows, {num_rows, count}, ScalarType::Float);
  if (num_rows == 0 || count == 0) return out;
  const uint64_t seed = static_cast<uint64_t>(*seed_tensor.const_data_ptr<int64_t>());
  const int64_t* row = rows.const_data_ptr<int64_t>();
  float* data = out.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, kGrainElements / count);
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float group[kGroup];
    for (int64_t r = begin; r < end; ++r) {
      // Groups start on whole blocks, so that element e is word e % 4 of block e / 4.
      for (int64_t start = first / 4 * 4; start < first + count; start += kGroup) {
        fill(seed, static_cast<uint64_t>(row[r]), static_cast<uint32_t>(start / 4),
             static_cast<uint32_t>(stream), group);
        const int64_t from = std::max(start, first);
        const int64_t to = std::min(start + kGroup, first + count);
        std::memcpy(data + r * count + (from - first), group + (from - start),
                    static_cast<size_t>(to - from) * sizeof(float));
      }
    }
  });
  return out;
}

Tensor philox_uniform(const Tensor& seed, const Tensor& rows, int64_t count, int64_t stream,
                      int64_t first) {
  return fill_rows(seed, rows, count, stream, first, &fill_uniform);
}

Tensor philox_normal(const Tensor& seed, const Tensor& rows, int64_t count, int64_t stream,
                     int64_t first) {
  return fill_rows(seed, rows, count, stream, first, &fill_normal);
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("philox_uniform", TORCH_BOX(&calm::philox_uniform));
  m.impl("philox_normal", TORCH_BOX(&calm::philox_normal));
}
