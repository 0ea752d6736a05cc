// What the patch codec's kernels for CPUs and GPUs share: who drops a token, and the order in which
// the gradient of the embedding is summed.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/philox.h"

namespace calm {

// Tokens in the order of their ids are cut in tiles of so many. A tile sums the rows of each id
// that it holds; sums of an id that lies in several tiles are added up afterwards. Where a tile
// begins depends on the tokens alone, so the result does not depend on threads, and a sum of n
// terms in float32 is short twice (32 and n / 32) in place of long once.
constexpr int64_t kTileTokens = 32;

// Tokens of patches of `patch_size`, some of them dropped: taken to be id 0.
struct TokenDropout {
  const int64_t* seed;  // null: none is dropped
  float probability;

  CALM_HOST_DEVICE bool drops(int64_t patch, int64_t k) const {
    if (seed == nullptr) return false;
    const PhiloxWords words = philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(patch),
                                     static_cast<uint32_t>(k / 4), Stream::kTokenDropout);
    // Chosen, not indexed: on a GPU that would put the words into memory.
    const uint32_t low = k % 2 == 0 ? words.word[0] : words.word[1];
    const uint32_t high = k % 2 == 0 ? words.word[2] : words.word[3];
    return to_uniform(k % 4 < 2 ? low : high) < probability;
  }
};

}  // namespace calm
