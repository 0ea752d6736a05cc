// Brier U-statistic of S draws for P positions: the device code, free of torch.
//
// Mapping: one warp a position. Its S(S-1)/2 pairs and S (draw, target) comparisons are laid out in
// one line and the lanes walk it 32 at a time; token by token a vote says how many comparisons of
// the 32 still agree, and the walk stops where none does (almost always after one or two tokens).
// At S=8, K=4 that is 36 comparisons: two rounds of votes.
//
// Fewest bytes: samples [S,P,K] and target read once (8 * (S+1) * K * P), scores written once
// (4 * n * P). The ids of a position are read again for every pair, from L1: 256 bytes at S=8, K=4.
#pragma once

#include <cstdint>

#include "common/brier.h"
#include "cuda/shared_memory.cuh"

namespace calm {

constexpr int kBrierWarpsPerBlock = 4;
constexpr unsigned kFullWarp = 0xffffffffu;

// The pair (i, j), i < j, with number q in the order (0,1), (0,2), (1,2), (0,3), ...
__device__ inline void decode_pair(int64_t q, int64_t& i, int64_t& j) {
  j = static_cast<int64_t>((1.0 + sqrt(1.0 + 8.0 * static_cast<double>(q))) * 0.5);
  // The root is rounded: step to the exact row.
  while (j * (j - 1) / 2 > q) --j;
  while ((j + 1) * j / 2 <= q) ++j;
  i = q - j * (j - 1) / 2;
}

// Dynamic shared memory: 2 * num_ngrams * sizeof(int64_t) per warp.
template <typename Id>
__global__ void __launch_bounds__(kBrierWarpsPerBlock * 32)
    brier_kernel(const Id* __restrict__ samples, const Id* __restrict__ target,
                 const BrierResults results, const BrierShape shape) {
  CALM_DYNAMIC_SHARED_ARRAY(int64_t, counts);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int64_t* hits = counts + 2 * shape.num_ngrams * warp;
  int64_t* pairs = hits + shape.num_ngrams;

  const int64_t num_pairs = shape.num_samples * (shape.num_samples - 1) / 2;
  const int64_t num_comparisons = num_pairs + shape.num_samples;
  const int64_t stride = shape.num_positions * shape.patch_size;
  const int64_t first_position = static_cast<int64_t>(blockIdx.x) * kBrierWarpsPerBlock + warp;
  const int64_t position_step = static_cast<int64_t>(gridDim.x) * kBrierWarpsPerBlock;

  // All lanes of a warp share the position, so votes and warp barriers are never divergent.
  for (int64_t p = first_position; p < shape.num_positions; p += position_step) {
    for (int64_t n = lane; n < 2 * shape.num_ngrams; n += 32) hits[n] = 0;
    __syncwarp();
    const Id* draws = samples + p * shape.patch_size;
    const Id* truth = target + p * shape.patch_size;
    for (int64_t base = 0; base < num_comparisons; base += 32) {
      const int64_t q = base + lane;
      const bool is_pair = q < num_pairs;
      bool agree = q < num_comparisons;
      const Id* a = truth;
      const Id* b = truth;
      if (is_pair) {
        int64_t i = 0;
        int64_t j = 0;
        decode_pair(q, i, j);
        a = draws + i * stride;
        b = draws + j * stride;
      } else if (agree) {
        b = draws + (q - num_pairs) * stride;
      }
      for (int64_t n = 0; n < shape.num_ngrams; ++n) {
        agree = agree && a[n] == b[n];
        const unsigned pair_votes = __ballot_sync(kFullWarp, agree && is_pair);
        const unsigned hit_votes = __ballot_sync(kFullWarp, agree && !is_pair);
        if ((pair_votes | hit_votes) == 0) break;
        if (lane == 0) {
          pairs[n] += __popc(pair_votes);
          hits[n] += __popc(hit_votes);
        }
      }
    }
    __syncwarp();
    for (int64_t n = lane; n < shape.num_ngrams; n += 32) {
      results.write(p * shape.num_ngrams + n, hits[n], pairs[n], shape.num_samples);
    }
    __syncwarp();
  }
}

}  // namespace calm
