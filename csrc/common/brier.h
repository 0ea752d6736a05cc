// Brier U-statistic of one position: what the CPU and CUDA kernels share.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace calm {

// Sizes of a brier_scores problem. samples [num_samples, num_positions, patch_size], contiguous;
// target [num_positions, patch_size]; scores [num_positions, num_ngrams].
struct BrierShape {
  int64_t num_samples;
  int64_t num_positions;
  int64_t patch_size;
  int64_t num_ngrams;
};

// 2/S #{x_i = y} - 2/(S(S-1)) #{i<j: x_i = x_j}, in double: the counts are exact, one rounding.
CALM_HOST_DEVICE inline float brier_score(int64_t hits, int64_t pairs, int64_t num_samples) {
  const double scale = 2.0 / static_cast<double>(num_samples);
  return static_cast<float>(static_cast<double>(hits) * scale -
                            static_cast<double>(pairs) *
                                (scale / static_cast<double>(num_samples - 1)));
}

}  // namespace calm
