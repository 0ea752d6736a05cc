// Temperature sampling from draws: what the CPU and CUDA kernels share. Every rounding step is that
// of calm_kernels/reference/temperature_sampling.py, so all backends draw the same patches.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "common/philox.h"

namespace calm {

// ids [num_sequences, num_draws, patch_size]; the ids of a patch are neighbours.
template <typename Id>
struct Draws {
  const Id* ids;
  int64_t sequence_stride;
  int64_t draw_stride;
  int64_t num_sequences;
  int64_t num_draws;
  int64_t patch_size;

  CALM_HOST_DEVICE const Id* patch(int64_t sequence, int64_t draw) const {
    return ids + sequence * sequence_stride + draw * draw_stride;
  }
};

inline constexpr uint64_t kPatchMultiplier = 0x9E6C63D0876A9A47u;
inline constexpr uint64_t kPatchFinalizer = 0xD6E8FEB86659FD93u;

// Where to look for a patch: a polynomial in the ids, scrambled. The upper bits are the best.
// Different patches may share all 64 bits, so whoever looks compares the ids.
template <typename Id>
CALM_HOST_DEVICE inline uint64_t hash_patch(const Id* ids, int64_t patch_size) {
  uint64_t hash = 0;
  for (int64_t k = 0; k < patch_size; ++k) {
    hash = hash * kPatchMultiplier + static_cast<uint64_t>(static_cast<int64_t>(ids[k]));
  }
  hash ^= hash >> 32;
  hash *= kPatchFinalizer;
  return hash ^ (hash >> 29);
}

// Slots of an open-addressing table that is at most half full, as a power of two.
CALM_HOST_DEVICE inline int vote_table_log2(int64_t num_draws) {
  int log2 = 1;
  while ((int64_t{1} << log2) < 2 * num_draws) ++log2;
  return log2;
}

// Uniform number `index` of a row: 52 bits of words 2 index and 2 index + 1, inside (0, 1).
CALM_HOST_DEVICE inline double wide_uniform(uint64_t seed, uint64_t row, int64_t index,
                                            Stream stream) {
  const PhiloxWords words = philox(seed, row, static_cast<uint32_t>(index / 2), stream);
  const bool odd = index % 2 != 0;
  const uint64_t upper = (odd ? words.word[2] : words.word[0]) >> 6;
  const uint64_t lower = (odd ? words.word[3] : words.word[1]) >> 6;
  return (static_cast<double>((upper << 26) | lower) + 0.5) * 0x1p-52;
}

// Weights of the vote. w(largest) = 1 and w(j - 1) = w(j) * factor(j), multiplied in this order.
struct VoteLaw {
  double exponent;   // b = 1/T, at most num_draws + 1
  double corrected;  // floor(b) + 1: where factor takes theta
  double theta;      // (floor(b) - 1/2) / (b - 1/2)

  CALM_HOST_DEVICE VoteLaw(double b, int64_t num_draws) {
    const double most = static_cast<double>(num_draws + 1);
    exponent = b > most ? most : b;
    const double whole = floor(exponent);
    corrected = whole + 1.0;
    theta = (whole - 0.5) / (exponent - 0.5);
  }

  CALM_HOST_DEVICE double factor(int64_t count) const {
    const double j = static_cast<double>(count);
    const double quotient = (j - exponent) / j;
    const double clamped = quotient < 0.0 ? 0.0 : quotient;
    return j == corrected ? clamped * theta : clamped;
  }
};

// Below this a weight rounds to zero, and so do those of all smaller counts: no factor exceeds 1.
inline constexpr double kNegligibleWeight = 0x1p-42;

// In multiples of 2^-40, half to even: sums over up to 8192 draws are exact.
CALM_HOST_DEVICE inline double rounded_weight(double weight) { return rint(weight * 0x1p40); }

// The state of a sequence in the exact method; member order = columns of the state tensor.
struct ExactProgress {
  int64_t matches;       // equal draws in a row so far; 0: no candidate
  int64_t trial;         // number of the next trial of the Bernoulli factory, from 1
  int64_t num_draws;     // consumed since the start
  int64_t num_uniforms;  // consumed since the start
  int64_t accepted;      // 1 when the candidate is the result
};
inline constexpr int64_t kExactColumns = 5;
static_assert(sizeof(ExactProgress) == kExactColumns * sizeof(int64_t));

// What an attempt needs: num_equal equal draws, then, with fraction > 0, a success of the factory.
struct ExactLaw {
  int64_t num_equal;
  double fraction;
  uint64_t seed;
  uint64_t row;
};

// Feeds one draw to a sequence that still waits. `equal`: the draw is the candidate, or there was
// none and it is now.
CALM_HOST_DEVICE inline void consume_draw(ExactProgress& state, bool equal, const ExactLaw& law) {
  const bool in_factory = state.matches == law.num_equal;
  ++state.num_draws;
  if (equal) {
    if (!in_factory) ++state.matches;
    const bool complete = state.matches == law.num_equal && law.fraction == 0.0;
    if (in_factory || complete) state.accepted = 1;
    return;
  }
  bool ends = true;
  if (in_factory) {
    const double u = wide_uniform(law.seed, law.row, state.num_uniforms, Stream::kExactTemperature);
    ends = u * static_cast<double>(state.trial) < law.fraction;
    ++state.num_uniforms;
    ++state.trial;
  }
  if (ends) {
    state.matches = 0;
    state.trial = 1;
  }
}

}  // namespace calm
