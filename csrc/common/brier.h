// Brier U-statistic of one position: what the CPU and CUDA kernels share.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace calm {

// Sizes of a problem. samples [num_samples, num_positions, patch_size], contiguous;
// target [num_positions, patch_size]; results [num_positions, num_ngrams].
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

// Where the results go: scores, or the two rates that a score is made of.
struct BrierResults {
  float* scores;      // null: rates are wanted
  float* hit_rates;   // #{x_i = y} / S
  float* pair_rates;  // #{i<j: x_i = x_j} / (S(S-1)/2)

  CALM_HOST_DEVICE void write(int64_t at, int64_t hits, int64_t pairs, int64_t num_samples) const {
    if (scores != nullptr) {
      scores[at] = brier_score(hits, pairs, num_samples);
      return;
    }
    const double count = static_cast<double>(num_samples);
    hit_rates[at] = static_cast<float>(static_cast<double>(hits) / count);
    pair_rates[at] = static_cast<float>(static_cast<double>(2 * pairs) / (count * (count - 1.0)));
  }
};

}  // namespace calm
