// Philox normals of one row in bulk, in vector lanes. Included by kernels that carry
// CALM_MULTIVERSION: everything here inlines into their clones and is compiled for each of them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/philox.h"

namespace calm {

// Blocks worked on together: 16 lanes of 32 bits fill the widest registers.
constexpr int kPhiloxLanes = 16;

// ln(u) for normal u in (0, 1): exponent and mantissa in [sqrt(1/2), sqrt(2)), then the polynomial
// of Cephes' logf. Below 2 ulp; branch-free, so that the compiler keeps it in lanes.
[[gnu::always_inline]] inline float fast_log(float u) {
  const uint32_t bits = std::bit_cast<uint32_t>(u);
  // Adding the distance of 1 from sqrt(1/2) carries into the exponent from sqrt(1/2) on.
  const uint32_t shifted = bits + (0x3f800000u - 0x3f3504f3u);
  const int exponent = static_cast<int>(shifted >> 23) - 127;
  const float mantissa = std::bit_cast<float>((shifted & 0x007fffffu) + 0x3f3504f3u);
  const float x = mantissa - 1.0f;
  const float x2 = x * x;
  float p = 7.0376836292e-2f;
  p = p * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const float e = static_cast<float>(exponent);
  return ((p * x * x2 - 0.5f * x2) + e * -2.12194440e-4f) + x + e * 0.693359375f;
}

// cos and sin of 2 pi u, u in [0, 1]: the nearest quarter turn is taken off exactly, the rest is a
// polynomial on [-pi/4, pi/4].
[[gnu::always_inline]] inline void fast_cos_sin_turns(float u, float& cosine, float& sine) {
  const float quarters = 4.0f * u;
  const int quadrant = static_cast<int>(quarters + 0.5f);
  const float t = (quarters - static_cast<float>(quadrant)) * 1.57079632679f;
  const float t2 = t * t;
  float s = -1.9515295891e-4f;
  s = s * t2 + 8.3321608736e-3f;
  s = s * t2 - 1.6666654611e-1f;
  s = s * t2 * t + t;
  float c = 2.443315711809948e-5f;
  c = c * t2 - 1.388731625493765e-3f;
  c = c * t2 + 4.166664568298827e-2f;
  c = c * t2 * t2 - 0.5f * t2 + 1.0f;
  const bool swap = (quadrant & 1) != 0;
  const float cosine_part = swap ? s : c;
  const float sine_part = swap ? c : s;
  const bool flip_cosine = ((quadrant + 1) & 2) != 0;
  const bool flip_sine = (quadrant & 2) != 0;
  cosine = flip_cosine ? -cosine_part : cosine_part;
  sine = flip_sine ? -sine_part : sine_part;
}

// The words of blocks [first_block, first_block + kPhiloxLanes) of a row, word by word: a 32-bit
// word in each 64-bit lane, so that a widening multiply is one instruction.
[[gnu::always_inline]] inline void philox_lanes(uint64_t seed, uint64_t row, uint32_t first_block,
                                                Stream stream,
                                                uint32_t (&__restrict words)[4][kPhiloxLanes]) {
  typedef uint64_t Lanes __attribute__((vector_size(64)));
  constexpr int kPerVector = 8;
  constexpr uint64_t kLow = 0xffffffffu;
  for (int half = 0; half < kPhiloxLanes / kPerVector; ++half) {
    Lanes c0, c1, c2, c3;
    for (int l = 0; l < kPerVector; ++l) {
      c0[l] = first_block + static_cast<uint32_t>(half * kPerVector + l);
      c1[l] = row & kLow;
      c2[l] = row >> 32;
      c3[l] = static_cast<uint64_t>(stream);
    }
    uint64_t key0 = seed & kLow;
    uint64_t key1 = seed >> 32;
#pragma GCC unroll 10
    for (int i = 0; i < kPhiloxRounds; ++i) {
      const Lanes product0 = (c0 & kLow) * static_cast<uint64_t>(kPhiloxMultiplier0);
      const Lanes product1 = (c2 & kLow) * static_cast<uint64_t>(kPhiloxMultiplier1);
      // High halves of the lanes are noise from here on; the next round masks what it multiplies.
      c0 = (product1 >> 32) ^ c1 ^ key0;
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ key1;
      c3 = product0;
      key0 = (key0 + kPhiloxWeyl0) & kLow;
      key1 = (key1 + kPhiloxWeyl1) & kLow;
    }
    for (int l = 0; l < kPerVector; ++l) {
      words[0][half * kPerVector + l] = static_cast<uint32_t>(c0[l]);
      words[1][half * kPerVector + l] = static_cast<uint32_t>(c1[l]);
      words[2][half * kPerVector + l] = static_cast<uint32_t>(c2[l]);
      words[3][half * kPerVector + l] = static_cast<uint32_t>(c3[l]);
    }
  }
}

// Normals of blocks [first_block, first_block + kPhiloxLanes) of a row: out[4 * lane + j].
[[gnu::always_inline]] inline void normals_of_blocks(uint64_t seed, uint64_t row,
                                                     uint32_t first_block, Stream stream,
                                                     float* __restrict out) {
  alignas(64) uint32_t words[4][kPhiloxLanes];
  alignas(64) float planes[4][kPhiloxLanes];
  philox_lanes(seed, row, first_block, stream, words);
  // Three plain loops: each stays in lanes, and the last one is nothing but the interleaving.
  for (int pair = 0; pair < 4; pair += 2) {
    for (int l = 0; l < kPhiloxLanes; ++l) {
      const float radius = std::sqrt(-2.0f * fast_log(to_uniform(words[pair][l])));
      float cosine, sine;
      fast_cos_sin_turns(to_uniform(words[pair + 1][l]), cosine, sine);
      planes[pair][l] = radius * cosine;
      planes[pair + 1][l] = radius * sine;
    }
  }
  for (int l = 0; l < kPhiloxLanes; ++l) {
    for (int j = 0; j < 4; ++j) out[4 * l + j] = planes[j][l];
  }
}

}  // namespace calm
