// Philox4x32-10 and the transforms of its words: the one random stream of the package.
//
// key = the 64-bit seed (low, high), counter = (block, row low, row high, stream); element e of a
// row is word e % 4 of block e / 4. Source: Salmon et al., SC 2011. The specification in Python is
// calm_kernels/reference/philox.py.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace calm {

// Who consumes the words; two streams never share one.
enum class Stream : uint32_t {
  kEnergyTargets = 0,
  kBatchTemperature = 1,
  kExactTemperature = 2,
  kHeadNoise = 3,
  kTokenDropout = 4,
  kLatent = 5,
};

struct PhiloxWords {
  uint32_t word[4];
};

inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
inline constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
inline constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 10;

// The four words of one block of one row.
CALM_HOST_DEVICE inline PhiloxWords philox(uint64_t seed, uint64_t row, uint32_t block,
                                           Stream stream) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = block;
  uint32_t c1 = static_cast<uint32_t>(row);
  uint32_t c2 = static_cast<uint32_t>(row >> 32);
  uint32_t c3 = static_cast<uint32_t>(stream);
  for (int i = 0; i < kPhiloxRounds; ++i) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// A uniform in the open interval (0, 1): the half step makes 24 significant bits, exact in float.
CALM_HOST_DEVICE inline float to_uniform(uint32_t word) {
  return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
}

}  // namespace calm
